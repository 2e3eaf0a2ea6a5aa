"""An instance under SGLang's own scheduling, without us.

Source: sglang 0.5.23, `PrefillAdder.add_one_req`, `NewTokenRatioTracker`, `retract_decode`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from pascal_sglang.policy.rank_forecast import NEVER
from pascal_sglang.policy.request import RequestStatus
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.request import SimRequest

CLIP_TOKENS = 4096
INIT_RATIO = 0.7
MIN_RATIO = INIT_RATIO * 0.14
RATIO_STEPS = 600
RETRACT_STEPS = 20
RATIO_STEP = (INIT_RATIO - MIN_RATIO) / RATIO_STEPS


class StockInstance(Instance):
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
        self.queue: deque[SimRequest] = deque()
        self._decayed_at = 0
        self._lacks = 0.0

    def may_prefill(self) -> bool:
        return True

    def decide(self) -> None:
        for request in self.inbox:
            self._wait(request)
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
        shrinks = sum(self._may_generate(request) for request in self.batch) * RATIO_STEP
        if self.ratio <= MIN_RATIO or not shrinks:
            return NEVER
        return self.batch.steps + max(1, int(self._lacks / shrinks))

    def waiting(self) -> tuple[int, int, int]:
        waiting = [*self.queue, *self.inbox]
        everybody = len(waiting) + len(self.filling)
        return len(waiting), everybody, sum(request.prompt for request in waiting)

    def _wait(self, request: SimRequest) -> None:
        request.status = RequestStatus.WAITING
        request.kv_tokens = request.prompt + request.total_tokens
        known = request.history and self.memory.knows(request.talk)
        request.cached = request.history if known else 0
        self.queue.append(request)

    def _may_generate(self, request: SimRequest) -> int:
        """Tokens that SGLang believes the request may still generate."""
        whole = request.reasoning + request.answer if self.knows_lengths else self.limit
        return min(max(0, whole - request.total_tokens), CLIP_TOKENS)

    def _decay(self) -> None:
        steps = self.batch.steps - self._decayed_at
        self._decayed_at = self.batch.steps
        self.ratio = max(MIN_RATIO, self.ratio - steps * RATIO_STEP)

    def _admit(self) -> None:
        share = 1.0 if self.knows_lengths else self.ratio
        reserved = sum(self._may_generate(request) * share for request in self.batch)
        reserved += sum(self._may_generate(request) for request in self.filling)
        left = self.memory.free - reserved
        chunk = self.cost.chunk - sum(request.unfilled for request in self.filling)
        slots = self.cost.slots - len(self.batch) - len(self.filling)
        while self.queue and slots > 0 and chunk > 0:
            request = self.queue[0]
            new = self._may_generate(request)
            if request.kv_tokens + new + 1 >= left:
                self._lacks = request.kv_tokens + new + 1 - left
                break
            self.queue.popleft()
            if request.cached and not self.memory.recall(request.talk):
                request.cached = 0
            request.unfilled = request.kv_tokens - request.cached
            self.recomputed_tokens += request.kv_tokens if request.total_tokens else 0
            self.memory.take(request.kv_tokens)
            request.status = RequestStatus.RUNNING
            self.filling.append(request)
            left -= request.kv_tokens + new + 1
            chunk -= request.unfilled
            slots -= 1

    def _retract(self) -> None:
        """Who has generated least goes, and of those the longest prompts."""
        order = sorted(self.batch, key=lambda j: (j.total_tokens, -j.prompt), reverse=True)
        while len(order) > 1 and self.memory.free < len(order):
            request = order.pop()
            self.leave(request)
            self.memory.give(request.held)
            request.pauses += 1
            self.retracted += 1
            self._wait(request)
        decoded = sum(request.total_tokens for request in order)
        whole = sum(
            request.reasoning + request.answer if self.knows_lengths else self.limit
            for request in order
        )
        self.ratio = min(1.0, (decoded + RETRACT_STEPS * len(order)) / (whole + 1))
