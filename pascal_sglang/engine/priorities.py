"""SGLang's priorities in the policy's terms.

Under a policy that schedules, the plan alone decides on priorities and on the order of a prefill.
"""

from __future__ import annotations

import sys

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.priorities import Priorities, with_priorities
from pascal_sglang.policy.registry import Policy


def take_over(scheduler: SchedulerProtocol, policy: Policy) -> Policy:
    """The policy under the scheduler's priorities, whose flags are as the operator gave them.

    SGLang's own use of them ends: it would sort what the plan admits anew, and where slots are
    short it would drop the KV of running requests.
    """
    scheduler.policy.policy = CacheAgnosticPolicy.FCFS
    scheduler.policy.enable_priority_scheduling = False
    preempts = scheduler.enable_priority_preemption
    scheduler.enable_priority_preemption = False
    if not scheduler.enable_priority_scheduling:
        return policy
    threshold = scheduler.priority_scheduling_preemption_threshold
    return with_priorities(policy, Priorities(preempts=preempts, threshold=threshold))


def priority_of(scheduler: SchedulerProtocol, req: Req) -> int:
    """The priority of a request, lower first; the same for all where priorities are off.

    A request without one goes last, as in SGLang.
    """
    if not scheduler.enable_priority_scheduling:
        return 0
    low_first = scheduler.schedule_low_priority_values_first
    given: int | None = req.priority
    if given is None:
        given = sys.maxsize if low_first else -sys.maxsize - 1
    return given if low_first else -given
