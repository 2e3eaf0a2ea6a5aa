"""The status of every request of a scheduler: one `RequestState` per SGLang `Req`.

A request changes status here and nowhere else: the policy's queue, the timeline, SGLang's clocks,
metrics and the decision log follow from the one call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.cluster.internal_requests import is_internal
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.drafts import drafts
from pascal_sglang.engine.kv.owned import keep_what_is_cached
from pascal_sglang.engine.kv.paused import PausedRequests
from pascal_sglang.engine.observability.decision_log import DecisionLog
from pascal_sglang.engine.observability.queue_times import entered_queue, left_queue
from pascal_sglang.engine.priorities import priority_of
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.kv_tier import KVTier
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PREFIX_HEAD_START, PassInfo, fastest_pace
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.running_mean import running_mean
from pascal_sglang.policy.timeline import Phase, PhaseTimeline
from pascal_sglang.request_checks import reader_of, tenant_of, thinking_budget_of
from pascal_sglang.support import (
    EVERYTHING,
    NOT_RECOMPUTED,
    Level,
    Support,
    first,
    of_request,
)

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 30


STATUSES = {
    KVTier.RESIDENT: RequestStatus.RESIDENT,
    KVTier.HOST: RequestStatus.HOST,
    KVTier.RECOMPUTE: RequestStatus.WAITING,
}


class RequestStates:
    """Makes the states of requests and carries out their transitions.

    The running requests are those of SGLang's batch. All others are in `queue` here, and in
    SGLang's waiting queue or in `paused_requests`.
    """

    # The current pass, whose clock is that of TP rank 0.
    pass_info: PassInfo
    # Requests that arrived and cannot be paused, by reason.
    unpausable: Counter[str]
    # Whether `--strip-thinking-cache` is given.
    strips_thinking: bool = False
    # Tokens that a request gets in a pass, on average.
    pass_tokens: float

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        config: PascalConfig,
        paused_requests: PausedRequests,
        queue: WaitQueue,
        decision_log: DecisionLog,
        support: Support = EVERYTHING,
    ) -> None:
        self.scheduler = scheduler
        self.config = config
        self.paused_requests = paused_requests
        self.queue = queue
        self.decision_log = decision_log
        self.support = support
        self.pass_info = PassInfo(0, 0.0, 0.0)
        self.unpausable = Counter()
        self.pass_tokens = 1.0
        self._drafts = drafts(scheduler)
        self._arrivals = 0

    def arrived(self, req: Req, asked: Any = None) -> RequestState:
        """Make the request's state. Its reader's pace and its priority may come with it.

        asked: SGLang's message that it was made of, which has inputs that the request gets later.
        """
        tpot_ms = self.config.answer_tpot_ms_of(req.sampling_params.custom_params)
        self._arrivals += 1
        pacer = Pacer(tpot_ms / 1000)
        reader = reader_of(req.stream, req.sampling_params)
        tells_tenants = self.config.fairness != "off"
        state = RequestState(
            self._arrivals,
            pacer,
            reader=reader,
            priority=priority_of(self.scheduler, req),
            tenant=tenant_of(req.sampling_params.custom_params) if tells_tenants else "",
            internal=is_internal(req),
            handle=req,
        )
        support = of_request(
            req,
            self.support,
            drafted=self._drafts,
            multimodal=asked is not None and asked.mm_inputs is not None,
        )
        state.pausable = support.level >= Level.RECOMPUTE
        state.keeps_kv = support.level >= Level.PAUSE
        state.recomputes = first(NOT_RECOMPUTED, req) is None
        if support.because is not None and not (state.pausable or state.internal):
            self._count_unpausable(support.because)
        if self.strips_thinking:
            keep_what_is_cached(req)
        req.pascal_state, req.pascal_support = state, support
        return state

    def _count_unpausable(self, reason: str) -> None:
        if not self.unpausable[reason] and reason not in self.support.lowered_by:
            logger.warning("pascal_sglang does not pause requests with %s", reason)
        self.unpausable[reason] += 1
        self.decision_log.unpausable(reason)

    def queued(self, req: Req) -> None:
        """The request entered SGLang's waiting queue, for the first time or after a retraction."""
        if self.support.level >= Level.RECOMPUTE:
            whole = len(req.origin_input_ids) + len(req.output_ids)
            cached = self.paused_requests.pool.cached_prefix(req, whole - 1)
            state_of(req).head_start = PREFIX_HEAD_START * cached.tokens // whole
        self.stopped(req, RequestStatus.WAITING)

    def queue_again(self, req: Req) -> None:
        """The request has waited elsewhere, and waits here from now on."""
        self.scheduler.waiting_queue.append(req)
        self.queued(req)

    def wait_again(self, req: Req) -> None:
        """The request, which holds no KV, waits to be prefilled again."""
        self.stopped(req, RequestStatus.WAITING)
        self.scheduler.waiting_queue.append(req)

    def stopped(self, req: Req, status: RequestStatus) -> None:
        """The request waits, or is paused, from now on."""
        entered_queue(req)
        self._update_resume_cost(req, status)
        self.queue.stopped(state_of(req), status, self.pass_info)

    def paused(self, req: Req, why: str) -> None:
        """The request leaves the running batch. Its last token may still be on its way."""
        state = state_of(req)
        state.kv_tokens = req.kv.kv_committed_len
        self.decision_log.paused(state, self.pass_info, why)

    def finish_pauses(self, *, wait: bool = False) -> None:
        """Handle the KV of the requests that left the batch and whose last token has arrived, and
        of those that spill. wait: for copies that are under way, too."""
        paused = self.paused_requests
        for req, tier in paused.finish_pauses(wait=wait):
            if paused.is_migrating(req):
                continue
            if state_of(req).status is RequestStatus.RESIDENT:
                self.spilled(req, tier)
                continue
            self.stopped(req, STATUSES[tier])
            self._left_device(req, tier)

    def spilled(self, req: Req, tier: KVTier) -> None:
        """The KV of a paused request went down to `tier`."""
        self._update_resume_cost(req, STATUSES[tier])
        self.queue.spilled(state_of(req), STATUSES[tier])
        self._left_device(req, tier)

    def lost(self, req: Req) -> None:
        """A request was coming back, and its KV could not be copied: it is prefilled again."""
        self.stopped(req, RequestStatus.WAITING)
        self._left_device(req, KVTier.RECOMPUTE)

    def resumed(self, req: Req) -> None:
        """A paused request is in the running batch again."""
        left_queue(req)
        self.started(req)

    def started(self, req: Req) -> None:
        """The request runs, or is prefilled, from now on."""
        self.decision_log.started(state_of(req), self.pass_info)
        self.queue.started(state_of(req), self.pass_info)

    def retract_held(self) -> None:
        """Send every held request back to the waiting queue without its KV, as SGLang does with
        those that it retracts. No step is in flight.

        A request handed over to another instance waits only if that instance sends it back.
        """
        for req in self.paused_requests.drop():
            if not self.paused_requests.is_migrating(req):
                self.wait_again(req)

    def ended(self, req: Req) -> None:
        """The request ended outside the running batch."""
        self.queue.remove(state_of(req))

    def observe(self, reqs: Iterable[Req]) -> list[Req]:
        """The requests may have produced tokens: bring their states up to date, tell human readers.

        Returns those that have just ended their reasoning and go on."""
        now = self.pass_info.now
        floor = fastest_pace(self.config.answer_tpot_ms / 1000, self.pass_info)
        # Looking these up costs as much as the rest of a turn.
        reasoning, program = Phase.REASONING, Reader.PROGRAM
        reasoning_ended: list[Req] = []
        if self._drafts:
            reqs = list(reqs)
            self._count_pass_tokens(reqs)
        for req in reqs:
            state: RequestState = req.pascal_state
            timeline: PhaseTimeline = req.pascal_timeline
            reasoning_tokens, answer_tokens = timeline.reasoning_tokens, timeline.answer_tokens
            state.total_tokens = reasoning_tokens + answer_tokens
            if timeline.reasoning_end is None:
                state.phase_tokens = reasoning_tokens
                continue
            if state.phase is reasoning:
                state.phase = Phase.ANSWERING
                state.credit = 0
                if reasoning_tokens > 0 and not req.finished():
                    reasoning_ended.append(req)
            state.phase_tokens = answer_tokens
            if state.reader is program:
                continue
            pacer = state.pacer
            if now <= pacer.early_until and floor <= pacer.tpot:
                pacer.received = answer_tokens
            elif answer_tokens > pacer.received:
                pacer.receive(now, answer_tokens, floor)
        return reasoning_ended

    def _count_pass_tokens(self, reqs: Iterable[Req]) -> None:
        """Take in how much the requests have grown since their states were brought up to date."""
        both = [(state_of(req).total_tokens, timeline_of(req)) for req in reqs]
        grown = [t.reasoning_tokens + t.answer_tokens - before for before, t in both if before]
        if grown := [tokens for tokens in grown if tokens > 0]:
            self.pass_tokens = running_mean(self.pass_tokens, sum(grown) / len(grown))

    def _left_device(self, req: Req, tier: KVTier) -> None:
        self.decision_log.left_device(state_of(req), tier, self.pass_info)
        if tier is KVTier.RECOMPUTE:
            self.scheduler.waiting_queue.append(req)

    def _update_resume_cost(self, req: Req, status: RequestStatus) -> None:
        """Note what starting the request again takes. Nothing asks that of one that runs."""
        state = state_of(req)
        state.remaining = remaining_of(req, state)
        if status is RequestStatus.RESIDENT:
            state.kv_tokens = req.kv.kv_committed_len
        elif status is RequestStatus.HOST:
            state.kv_tokens = self.paused_requests.copy_of(req).tokens
        else:
            state.kv_tokens = len(req.origin_input_ids) + len(req.output_ids)


def remaining_of(req: Req, state: RequestState) -> int:
    """Tokens the request can still produce in its phase: what `max_new_tokens` leaves, and while it
    reasons no more than its `thinking_budget`."""
    params = req.sampling_params
    left = UNLIMITED
    if params.max_new_tokens is not None:
        left = params.max_new_tokens - len(req.output_ids)
    budget = thinking_budget_of(params.custom_params)
    if state.phase is Phase.REASONING and budget is not None:
        left = min(left, budget + 1 - state.phase_tokens)
    return max(0, left)
