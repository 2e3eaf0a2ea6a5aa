"""Keeps the policy's picture of each request true: one `RequestState` per SGLang `Req`."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.cluster.internal_requests import is_internal
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.observability.phases import timeline_of
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.ranking import PassInfo, fastest_pace
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 30


class RequestStates:
    """Makes members and brings them up to date.

    unpausable: how many requests arrived that cannot be paused, by reason.
    """

    def __init__(self, config: PascalConfig) -> None:
        self.config = config
        self.unpausable: Counter[str] = Counter()
        self._arrivals = 0

    def arrived(self, req: Req) -> RequestState:
        """Make the request's member; its reader's pace may come with the request."""
        tpot_ms = self.config.answer_tpot_ms_of(req.sampling_params.custom_params)
        self._arrivals += 1
        pacer = Pacer(tpot_ms / 1000)
        state = RequestState(self._arrivals, pacer, internal=is_internal(req), handle=req)
        reason = why_not_pausable(req)
        if reason:
            state.pausable = False
            if not self.unpausable[reason]:
                logger.warning("pascal_sglang does not pause requests with %s", reason)
            self.unpausable[reason] += 1
        req.pascal_state = state
        return state

    def observe(self, req: Req, pass_info: PassInfo) -> bool:
        """The request may have produced tokens: bring its member up to date, tell its reader.

        True if it has just ended its thinking."""
        state, timeline = state_of(req), timeline_of(req)
        if new := timeline.answer_tokens - state.pacer.delivered:
            floor = fastest_pace(self.config.answer_tpot_ms / 1000, pass_info)
            state.pacer.deliver(pass_info.now, new, floor=floor)
        answering = timeline.phase is Phase.ANSWERING
        reasoning_ended = answering and state.phase is Phase.REASONING
        if reasoning_ended:
            state.phase = Phase.ANSWERING
            state.credit = 0
        state.phase_tokens = timeline.answer_tokens if answering else timeline.reasoning_tokens
        state.total_tokens = timeline.reasoning_tokens + timeline.answer_tokens
        return reasoning_ended and timeline.reasoning_tokens > 0 and not req.finished()


def state_of(req: Req) -> RequestState:
    state: RequestState = req.pascal_state
    return state


def remaining_of(req: Req, state: RequestState) -> int:
    """Tokens the request can still produce in its phase: what `max_new_tokens` leaves, and while it
    thinks no more than its `thinking_budget`."""
    params = req.sampling_params
    left = UNLIMITED
    if params.max_new_tokens is not None:
        left = params.max_new_tokens - len(req.output_ids)
    custom = params.custom_params
    if state.phase is Phase.REASONING and isinstance(custom, dict):
        budget = custom.get("thinking_budget")
        if isinstance(budget, int) and budget >= 0:
            left = min(left, budget + 1 - state.phase_tokens)
    return max(0, left)


def why_not_pausable(req: Req) -> str | None:
    """What about the request the engine cannot carry; None if it can be paused."""
    params = req.sampling_params
    reasons: dict[str, Any] = {
        "beam search": req.beam_group is not None,
        "a session": req.session is not None or req.session_id is not None,
        "multimodal inputs": req.multimodal_inputs is not None,
        "input embeddings": req.input_embeds is not None,
        "a LoRA adapter": req.lora_id is not None,
        "hidden states returned": bool(req.return_hidden_states),
        "a grammar": any((params.json_schema, params.regex, params.ebnf, params.structural_tag)),
        "penalties": bool(
            params.frequency_penalty
            or params.presence_penalty
            or params.repetition_penalty != 1.0
            or params.min_new_tokens
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
