"""SGLang's priorities around the order of any policy.

Urgent answers go first, then requests by priority, then each priority by the policy's own order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """How far a priority goes."""

    # Whether a request displaces running ones for their priority alone.
    preempts: bool = True
    # The difference of priorities that has to be exceeded for that.
    threshold: int = 10


def with_priorities(policy: Policy, priorities: Priorities) -> Policy:
    """The policy with `RequestState.priority` above its own order, and below its urgent answers.

    Its ranks are `(not urgent, priority, class, quanta)`.
    """

    def rank(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
        own = policy.rank(request, pass_info, tuning)
        return (int(own[-2] != policy.urgent), request.priority, *own)

    def displaces(starting: Rank, running: Rank) -> bool:
        """An urgent answer displaces what is not urgent; apart from that, the policy's own order
        decides, or a priority that is better by enough."""
        if starting >= running:
            return False
        if starting[0] < running[0] or policy.displaces(starting[2:], running[2:]):
            return True
        return priorities.preempts and running[1] - starting[1] > priorities.threshold

    return dataclasses.replace(policy, rank=rank, worst=None, displaces=displaces)
