"""An instance under SGLang's own scheduling, without us.

Source: sglang 0.5.23, `PrefillAdder.add_one_req`, `NewTokenRatioTracker`, `retract_decode`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from pascal_sglang.policy.request import Place
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.rank_forecast import NEVER
from pascal_sglang.sim.request import Job

CLIP_TOKENS = 4096
INIT_RATIO = 0.7
MIN_RATIO = INIT_RATIO * 0.14
RATIO_STEPS = 600
RETRACT_STEPS = 20
RATIO_STEP = (INIT_RATIO - MIN_RATIO) / RATIO_STEPS


class Stock(Instance):
    """Prefill first, in order of arrival; admission reserves a share of what everybody may still
    generate; where that was too little, who has generated least is dropped and recomputed.

    knows_lengths: `ignore_eos` with a limit, as `evals` sends: the whole rest is reserved.
    limit: otherwise, `max_new_tokens` of every request.
    """

    def __init__(self, *args: Any, knows_lengths: bool, limit: int = 32768, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.knows_lengths = knows_lengths
        self.limit = limit
        self.ratio = INIT_RATIO
        self.retracted = 0
        self.queue: deque[Job] = deque()
        self._decayed_at = 0
        self._lacks = 0.0

    def may_prefill(self) -> bool:
        return True

    def decide(self) -> None:
        for job in self.inbox:
            self._wait(job)
        self.inbox.clear()
        self.again = False
        self._decay()
        if self.memory.free < len(self.batch):
            self._retract()
        if self.queue:
            self._admit()
        self.stirred = False

    def next_look(self) -> int:
        if not self.queue or self.knows_lengths:
            return NEVER
        # The reserve shrinks by itself until the first in the queue fits.
        shrinks = sum(self._may_generate(job) for job in self.batch) * RATIO_STEP
        if self.ratio <= MIN_RATIO or not shrinks:
            return NEVER
        return self.batch.steps + max(1, int(self._lacks / shrinks))

    def waiting(self) -> tuple[int, int, int]:
        waiting = [*self.queue, *self.inbox]
        everybody = len(waiting) + len(self.filling)
        return len(waiting), everybody, sum(job.prompt for job in waiting)

    def _wait(self, job: Job) -> None:
        job.place = Place.WAITING
        job.kv_tokens = job.prompt + job.total_tokens
        known = job.history and self.memory.knows(job.talk)
        job.cached = job.history if known else 0
        self.queue.append(job)

    def _may_generate(self, job: Job) -> int:
        """Tokens that SGLang believes the request may still generate."""
        whole = job.reasoning + job.answer if self.knows_lengths else self.limit
        return min(max(0, whole - job.total_tokens), CLIP_TOKENS)

    def _decay(self) -> None:
        steps = self.batch.steps - self._decayed_at
        self._decayed_at = self.batch.steps
        self.ratio = max(MIN_RATIO, self.ratio - steps * RATIO_STEP)

    def _admit(self) -> None:
        share = 1.0 if self.knows_lengths else self.ratio
        reserved = sum(self._may_generate(job) * share for job in self.batch)
        reserved += sum(self._may_generate(job) for job in self.filling)
        left = self.memory.free - reserved
        chunk = self.cost.chunk - sum(job.unfilled for job in self.filling)
        slots = self.cost.slots - len(self.batch) - len(self.filling)
        while self.queue and slots > 0 and chunk > 0:
            job = self.queue[0]
            new = self._may_generate(job)
            if job.kv_tokens + new + 1 >= left:
                self._lacks = job.kv_tokens + new + 1 - left
                break
            self.queue.popleft()
            if job.cached and not self.memory.recall(job.talk):
                job.cached = 0
            job.unfilled = job.kv_tokens - job.cached
            self.recomputed_tokens += job.kv_tokens if job.total_tokens else 0
            self.memory.take(job.kv_tokens)
            job.place = Place.RUNNING
            self.filling.append(job)
            left -= job.kv_tokens + new + 1
            chunk -= job.unfilled
            slots -= 1

    def _retract(self) -> None:
        """Who has generated least goes, and of those the longest prompts."""
        order = sorted(self.batch, key=lambda j: (j.total_tokens, -j.prompt), reverse=True)
        while len(order) > 1 and self.memory.free < len(order):
            job = order.pop()
            self.leave(job)
            self.memory.give(job.held)
            job.pauses += 1
            self.retracted += 1
            self._wait(job)
        decoded = sum(job.total_tokens for job in order)
        whole = sum(
            job.reasoning + job.answer if self.knows_lengths else self.limit for job in order
        )
        self.ratio = min(1.0, (decoded + RETRACT_STEPS * len(order)) / (whole + 1))
