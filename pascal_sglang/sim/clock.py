"""Simulated time: a heap of what happens when."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[[Any], None]


class Clock:
    """Events in order of time; those of one time in the order they were announced.

    now: seconds. happened: events so far.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._announced = 0

    def at(self, when: float, action: Action, subject: Any = None) -> None:
        """`action(subject)` happens at `when`, which must not be in the past."""
        if when < self.now:
            if when < self.now - 1e-6:
                raise RuntimeError(f"an event at {when} s was announced at {self.now} s")
            when = self.now
        self._announced += 1
        heapq.heappush(self._heap, (when, self._announced, action, subject))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            self.now, _, action, subject = heapq.heappop(heap)
            self.happened += 1
            action(subject)
