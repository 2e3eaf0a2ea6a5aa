"""Who gives way, worst first, without ranking everybody who runs in every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState

# Passes a ranking of those who run is used for. Ranks change but once in many tokens, and whoever
# takes a victim from an old ranking looks at its rank of today.
KEEP_PASSES = 32


class Victims:
    """Running requests that may be paused, ranked once and used for several passes."""

    def __init__(self, policy: Policy, tuning: Tuning) -> None:
        self.policy = policy
        self.tuning = tuning
        self._ranked: list[RequestState] = []
        self._ranked_in = -KEEP_PASSES

    def worst_first(
        self, running: Sequence[RequestState], pass_info: PassInfo, *, fresh: bool = True
    ) -> Iterator[RequestState]:
        """Pausable requests of `running`. `fresh`: by today's ranking; otherwise an earlier one may
        serve, which lacks those who have started since."""
        age = pass_info.pass_no - self._ranked_in
        if age >= KEEP_PASSES or (fresh and age):
            self._rank(running, pass_info)
        present = set(running)
        return (m for m in self._ranked if m in present)

    def is_fresh(self, pass_info: PassInfo) -> bool:
        return self._ranked_in == pass_info.pass_no

    def _rank(self, running: Sequence[RequestState], pass_info: PassInfo) -> None:
        rank, key, tuning = self.policy.rank, self.policy.key, self.tuning
        ranked = [
            (rank(m, pass_info, tuning), key(m, tuning), m.seq, m) for m in running if m.pausable
        ]
        ranked.sort(reverse=True)  # Never compares requests: `seq` is unique.
        self._ranked = [entry[-1] for entry in ranked]
        self._ranked_in = pass_info.pass_no
