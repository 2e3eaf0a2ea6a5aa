"""What the controller knows of its instances: their last status, and what it decided since."""

from __future__ import annotations

from collections import deque

from pascal_sglang.cluster.messages import LoadReport
from pascal_sglang.policy.placement import FIGURES, Instance

# Dispatches remembered per instance. One that never says how it is must not fill the memory.
OPEN_DISPATCHES = 1 << 14
# Instances report at least once a second; after this long without a word one counts as silent.
SILENT_S = 5.0


class LoadTracker:
    """One `Instance` per DP rank, kept true between two status messages: a dispatch counts at once
    and until its instance says that it has taken it in. Times are seconds of one clock.

    heard: when each instance last said how it is; None before it first did.
    """

    def __init__(self, instances: int) -> None:
        self.instances = [Instance(index) for index in range(instances)]
        self.heard: list[float | None] = [None] * instances
        self._sent = [0] * instances
        # Dispatches not yet counted in a status: their number, and KV they will need.
        self._open: list[deque[tuple[int, int]]] = [
            deque(maxlen=OPEN_DISPATCHES) for _ in range(instances)
        ]

    def sent(self, index: int, tokens: int) -> None:
        """A request with a prompt of `tokens` went to an instance."""
        self._sent[index] += 1
        self._open[index].append((self._sent[index], tokens))

    def dispatched(self, index: int) -> int:
        """Requests that went to an instance so far."""
        return self._sent[index]

    def is_silent(self, index: int, now: float) -> bool:
        """Whether the instance has reported before and has stopped to."""
        heard = self.heard[index]
        return heard is not None and now - heard > SILENT_S

    def hear(self, status: LoadReport, now: float) -> None:
        """Take in a status message."""
        self.heard[status.dp_rank] = now
        waiting = self._open[status.dp_rank]
        while waiting and waiting[0][0] <= status.received:
            waiting.popleft()
        instance = self.instances[status.dp_rank]
        for name in FIGURES:
            setattr(instance, name, getattr(status, name))
        instance.reasoning += len(waiting)
        instance.load += len(waiting)
        instance.fits = max(0, instance.fits - len(waiting))
        instance.waiting += sum(tokens for _, tokens in waiting)
