"""Who decodes together, advanced many steps at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.request import Job


class Batch(Sequence[Job]):
    """The running batch. Step k ends `time_of(k)`; while its members stay the same, that is a
    quadratic of k, because every step adds one KV token per member.

    steps: decode steps so far. kv: KV tokens that the next step reads. origin: when it begins.
    """

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.steps = 0
        self.kv = 0
        self.origin = 0.0
        self._jobs: dict[Job, None] = {}
        self._synced = -1

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        """Members, all of them up to date."""
        if self._synced != self.steps:
            for job in self._jobs:
                self.sync(job)
            self._synced = self.steps
        return iter(self._jobs)

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Job]: ...
    def __getitem__(self, index: int | slice) -> Job | Sequence[Job]:
        return list(self)[index]

    def __contains__(self, job: object) -> bool:
        return job in self._jobs

    def join(self, job: Job) -> None:
        job.step, job.at = self.steps, self.origin
        self._jobs[job] = None
        self.kv += job.held

    def leave(self, job: Job) -> None:
        """Take a job out, up to date."""
        self.sync(job)
        del self._jobs[job]
        job.due = 0
        self.kv -= job.held

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

        Otherwise tokens are spread evenly over the time between two looks at a member; a reader
        who misses none between two of them cannot tell.
        """
        if noticed:
            for job in self._jobs:
                if job.phase is Phase.ANSWERING:
                    self.sync(job)
                    job.at = self.origin + seconds
        self.origin += seconds

    def sync(self, job: Job) -> None:
        """Let a member have the tokens of the steps that have ended since it was last looked at."""
        tokens = self.steps - job.step
        if not tokens:
            job.at = self.origin
            return
        if job.phase is Phase.ANSWERING:
            every = (self.origin - job.at) / tokens
            job.pacer.deliver(job.at + every, tokens, every)
        job.phase_tokens += tokens
        job.total_tokens += tokens
        job.step, job.at = self.steps, self.origin
