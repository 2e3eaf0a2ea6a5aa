"""Who decodes together, advanced many steps at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.request import SimRequest

# Looking it up costs as much as the rest of `Batch.sync`.
ANSWERING = Phase.ANSWERING


class Batch(Sequence[SimRequest]):
    """The running batch. Step k ends `time_of(k)`; while its requests stay the same, that is a
    quadratic of k, because every step adds one KV token per request.

    steps: decode steps so far. kv: KV tokens that the next step reads. origin: when it begins.
    """

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.steps = 0
        self.kv = 0
        self.origin = 0.0
        self._jobs: dict[SimRequest, None] = {}
        self._synced = -1

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[SimRequest]:
        """Members, all of them up to date."""
        if self._synced != self.steps:
            for request in self._jobs:
                self.sync(request)
            self._synced = self.steps
        return iter(self._jobs)

    @overload
    def __getitem__(self, index: int) -> SimRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SimRequest]: ...
    def __getitem__(self, index: int | slice) -> SimRequest | Sequence[SimRequest]:
        return list(self)[index]

    def __contains__(self, request: object) -> bool:
        return request in self._jobs

    def join(self, request: SimRequest) -> None:
        request.step, request.at = self.steps, self.origin
        self._jobs[request] = None
        self.kv += request.held

    def leave(self, request: SimRequest) -> None:
        """Take a job out, up to date."""
        self.sync(request)
        del self._jobs[request]
        request.due = 0
        self.kv -= request.held

    @property
    def step_s(self) -> float:
        """Seconds that the next step takes."""
        return self.cost.decode(len(self._jobs), self.kv)

    def time_of(self, step: int) -> float:
        """When a step to come ends."""
        count, grows = step - self.steps, self.cost.kv_token_s * len(self._jobs)
        return self.origin + count * (self.step_s + grows * (count - 1) / 2)

    def steps_by(self, now: float) -> int:
        """The last step that has ended by `now`."""
        passed = now - self.origin
        if passed <= 0 or not self._jobs:
            return self.steps
        a = self.cost.kv_token_s * len(self._jobs) / 2
        b = self.step_s - a
        count = int((math.sqrt(b * b + 4 * a * passed) - b) / (2 * a) if a else passed / b)
        # The root is off by rounding where a step ends just now.
        step = self.steps + count
        while self.time_of(step + 1) <= now:
            step += 1
        while step > self.steps and self.time_of(step) > now:
            step -= 1
        return step

    def advance(self, step: int) -> int:
        """All steps up to `step` have ended; how many tokens that made."""
        if step <= self.steps:
            return 0
        self.origin = self.time_of(step)
        made = (step - self.steps) * len(self._jobs)
        self.steps = step
        self.kv += made
        return made

    def hold_up(self, seconds: float, *, noticed: bool) -> None:
        """The next step begins that much later. `noticed`: answers are brought up to date first, so
        that the pause falls between the right two tokens.

        Otherwise tokens are spread evenly over the time between two looks at a request; a reader
        who misses none between two of them cannot tell.
        """
        if noticed:
            for request in self._jobs:
                if request.phase is Phase.ANSWERING:
                    self.sync(request)
                    request.at = self.origin + seconds
        self.origin += seconds

    def sync(self, request: SimRequest) -> None:
        """Give a request the tokens of the steps that have ended since it was looked at."""
        origin = self.origin
        if tokens := self.steps - request.step:
            if request.phase is ANSWERING:
                every = (origin - request.at) / tokens
                request.pacer.deliver(request.at + every, tokens, every)
            request.phase_tokens += tokens
            request.total_tokens += tokens
            request.step = self.steps
        request.at = origin
