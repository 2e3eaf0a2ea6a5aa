"""What SGLang's prefill step may take, and the policy's queue kept the same as SGLang's.

SGLang puts requests into its waiting queue inside its prefill step too: those whose grammar has
been compiled. The step sees only what the plan admits, so these join the others, and the plan of
the next pass decides on them. SGLang's own preemption by priority is off (`engine.priorities`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import ERRORS_LOGGED
from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.request import RequestState, RequestStatus

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class Admission:
    """Splits SGLang's waiting queue for the length of a prefill step."""

    scheduler: SchedulerProtocol
    paused_requests: PausedRequests
    queue: WaitQueue
    # Waiting requests that the plan of this pass admits, best first.
    plan: list[Req] = field(default_factory=list)
    # Passes in which the policy's queue was not SGLang's.
    errors: int = 0
    # Waiting requests that the prefill step does not see; None outside of it.
    _withheld: list[Req] | None = None

    @contextmanager
    def only_planned(self, started: Callable[[Req], None]) -> Iterator[None]:
        """The waiting queue holds nothing but the plan, in its order. `started` is told of each
        request that the step took."""
        scheduler = self.scheduler
        waiting = scheduler.waiting_queue
        present = set(waiting) if self.plan else set()
        shown = self._with_states([req for req in self.plan if req in present])
        taken = set(shown)
        self._withheld = [req for req in waiting if req not in taken] if taken else waiting
        scheduler.waiting_queue = list(shown)
        try:
            yield
        finally:
            left = set(scheduler.waiting_queue)
            scheduler.waiting_queue = scheduler.waiting_queue + self._withheld
            self._withheld = None
            for req in shown:
                # A request that was aborted meanwhile has left the policy's queue already.
                if req not in left and self.queue.holds(state_of(req)):
                    started(req)

    def _with_states(self, reqs: list[Req]) -> list[Req]:
        """The first of `reqs` for which there are recurrent states now. SGLang takes these for
        granted, and the plan counts with those that pauses will free."""
        states = self.paused_requests.pool.states
        if states is None:
            return reqs
        free = states.free - (self.scheduler.chunked_req is not None)
        # SGLang takes care that there are enough for one request.
        least = int(free == states.size)
        return reqs[: max(least, free // states.for_prefill)]

    @contextmanager
    def everybody(self) -> Iterator[None]:
        """The waiting queue is whole, also inside the prefill step; who is added to it there is
        withheld from the step. `--max-queued-requests` counts all, and may remove any."""
        if self._withheld is None:
            yield
            return
        scheduler = self.scheduler
        shown = scheduler.waiting_queue
        scheduler.waiting_queue = shown + self._withheld
        try:
            yield
        finally:
            now, seen = set(scheduler.waiting_queue), set(shown)
            self._withheld = [req for req in scheduler.waiting_queue if req not in seen]
            scheduler.waiting_queue = [req for req in shown if req in now]

    def is_true(self, *, thorough: bool) -> bool:
        """Whether the policy's queue is SGLang's waiting queue and the paused requests: their
        number, or `thorough`, each of them in its place."""
        queue, waiting = self.queue, self.scheduler.waiting_queue
        if len(queue) != len(waiting) + self.paused_requests.paused_count():
            return False
        return not thorough or all(
            queue.holds(state) and state.status is status for state, status in self._expected()
        )

    def _expected(self) -> Iterator[tuple[RequestState, RequestStatus]]:
        """Those who wait or are paused, each with its place."""
        paused_requests = self.paused_requests
        for status, reqs in (
            (RequestStatus.WAITING, self.scheduler.waiting_queue),
            (RequestStatus.RESIDENT, paused_requests.in_status(PauseStatus.RESIDENT)),
            (RequestStatus.HOST, paused_requests.in_status(PauseStatus.HOST)),
        ):
            yield from (
                (state_of(req), status) for req in reqs if not paused_requests.is_migrating(req)
            )

    def check(self, *, thorough: bool) -> None:
        """The policy plans for exactly those who wait or are paused. Its queue is made anew where
        it does not: a request that is gone would be planned first, and a missing one never."""
        if self.is_true(thorough=thorough):
            return
        self.errors += 1
        if self.errors <= ERRORS_LOGGED:
            logger.error("pascal_sglang: the policy's queue was not SGLang's and is made anew")
        self.queue.recount([])
        places = dict(self._expected())
        for state, status in places.items():
            state.status = status
        self.queue.recount([*places])
