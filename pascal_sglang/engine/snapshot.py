"""Everything about a running request but its KV, as plain JSON values, and the request made from it
on another instance.

Listed field by field: what is not listed here does not travel, and a request that has any of it
stays (`why_not_movable`). The detokenizer's own state of a request stays where it is, in the one
detokenizer all instances share; the cursors into it travel.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from typing import Any

import msgspec
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang.engine.members import member_of, why_not_pausable
from pascal_sglang.engine.phases import timeline_of
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.timeline import Break, Phase, PhaseTimeline

VERSION = 1

# Attributes of `Req` that are plain values, set on the new request as they are.
PLAIN = (
    "_is_reasoning_over",
    "reasoning_tokens",
    "_think_end_match_len",
    "_think_start_match_len",
    "surr_offset",
    "read_offset",
    "decoded_text",
    "send_token_offset",
    "send_decode_id_offset",
    "send_output_token_logprobs_offset",
    "logprob_start_len",
    "input_logprob_sent",
    "is_retracted",
    "retracted_stain",
    "retraction_count",
    "cached_tokens",
    "already_computed",
    "cached_tokens_device",
    "cached_tokens_host",
    "cached_tokens_storage",
    "_cache_breakdown_computed",
    "arrival_processed_tokens",
)
# Arguments of `Req` that are plain values and attributes of the same name.
GIVEN = (
    "rid",
    "return_logprob",
    "stream",
    "custom_logit_processor",
    "require_reasoning",
    "priority",
    "extra_key",
    "cache_salt",
    "routing_key",
    "http_worker_ipc",
    "return_flat_raw_top_logprobs",
    "sampling_logprobs_mode",
)
# Log probabilities of returned tokens: lists, of lists for the top ones.
LOGPROBS = (
    "output_token_logprobs_val",
    "output_token_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx",
)
TIMES = (
    *(name for name in SchedulerReqTimeStats.__dataclass_fields__ if name.endswith("_time")),
    "queue_duration_s",
)

KEYS = frozenset(
    {
        "version",
        "given",
        "plain",
        "logprobs",
        "times",
        "prompt_ids",
        "output_ids",
        "sampling",
        "top_logprobs_num",
        "token_ids_logprob",
        "timeline",
        "pacer",
        "member",
        "blocked_since",
    }
)


def why_not_movable(req: Req) -> str | None:
    """What about the request cannot travel; None if all of it can."""
    found = why_not_pausable(req)
    if found is not None:
        return found
    reasons: dict[str, Any] = {
        "prompt log probabilities": req.return_logprob and not req.input_logprob_sent,
        "routed experts returned": req.return_routed_experts or req.return_indexer_topk,
        "a sampling mask returned": req.return_sampling_mask,
        "embedding overrides": req.positional_embed_overrides is not None,
        "token types": req.token_type_ids is not None,
        "customized output": req.customized_info is not None,
        "a change of weights": bool(req.weight_version_events),
        "cache hints": req.kv_hints is not None,
        "a watermark": req.sampling_params.watermark is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def export_state(req: Req, blocked_since: float) -> dict[str, Any]:
    """The state of a request that stands still; its reader has been kept waiting since then.

    Raises: TypeError for a value that JSON does not have.
    """
    params = req.sampling_params
    custom = params.custom_params
    if isinstance(custom, dict) and "__req__" in custom:
        params = msgspec.structs.replace(
            params, custom_params={k: v for k, v in custom.items() if k != "__req__"}
        )
    member = member_of(req)
    logprobs = {} if not req.return_logprob else {n: getattr(req.logprob, n) for n in LOGPROBS}
    return {
        "version": VERSION,
        "given": {name: getattr(req, name) for name in GIVEN},
        "plain": {name: getattr(req, name) for name in PLAIN},
        "logprobs": _plain(logprobs),
        "times": {name: getattr(req.time_stats, name) for name in TIMES},
        "prompt_ids": req.origin_input_ids.tolist(),
        "output_ids": req.output_ids.tolist(),
        "sampling": _plain(msgspec.to_builtins(params)),
        "top_logprobs_num": req.logprob.top_logprobs_num,
        "token_ids_logprob": req.logprob.token_ids_logprob,
        "timeline": dataclasses.asdict(timeline_of(req)),
        "pacer": dataclasses.asdict(member.pacer),
        "member": {
            "phase": member.phase.value,
            "phase_tokens": member.phase_tokens,
            "total_tokens": member.total_tokens,
            "credit": member.credit,
        },
        "blocked_since": blocked_since,
    }


def problem_with(state: dict[str, Any], kv_tokens: int, longest: int) -> str | None:
    """Why a state cannot be continued here; None if it can. longest: tokens of the longest request
    that this instance serves."""
    if state.get("version") != VERSION:
        return f"state of version {state.get('version')!r}"
    if state.keys() != KEYS:
        return "state with unknown or missing fields"
    prompt, output = state["prompt_ids"], state["output_ids"]
    if not (_is_ids(prompt) and _is_ids(output) and prompt and output):
        return "state without tokens"
    if kv_tokens != len(prompt) + len(output) - 1:
        return "state and KV of different lengths"
    for name, keys in (("given", GIVEN), ("plain", PLAIN), ("times", TIMES)):
        if not isinstance(state[name], dict) or state[name].keys() != set(keys):
            return f"state with other {name} fields"
    try:
        params = msgspec.convert(_floats(state["sampling"]), SamplingParams)
        _timeline(state), _pacer(state), Phase(state["member"]["phase"])
    except (msgspec.ValidationError, TypeError, ValueError, KeyError) as error:
        return f"state that does not read: {type(error).__name__}"
    if params.max_new_tokens is None or len(prompt) + params.max_new_tokens > longest:
        return "longer than this instance serves"
    return None


def import_state(scheduler: Any, state: dict[str, Any]) -> Req:
    """The request that `state` describes, which `problem_with` had nothing against."""
    given = state["given"]
    req = Req(
        given["rid"],
        None,
        array("q", state["prompt_ids"]),
        msgspec.convert(_floats(state["sampling"]), SamplingParams),
        **{name: value for name, value in given.items() if name != "rid"},
        top_logprobs_num=state["top_logprobs_num"],
        token_ids_logprob=state["token_ids_logprob"],
        eos_token_ids=scheduler.model_config.hf_eos_token_id,
        vocab_size=scheduler.model_config.vocab_size,
        disagg_mode=scheduler.disaggregation_mode,
        metrics_collector=(
            scheduler.metrics_collector if scheduler.metrics_reporter.enable_metrics else None
        ),
    )
    req.tokenizer = scheduler.tokenizer
    req.output_ids = array("q", state["output_ids"])
    for name, value in state["plain"].items():
        setattr(req, name, value)
    for name, value in state["times"].items():
        setattr(req.time_stats, name, value)
    for name, value in _floats(state["logprobs"]).items():
        setattr(req.logprob, name, value)
    if req.surr_offset is not None:
        # As `Req.init_incremental_detokenize` leaves them.
        req.surr_and_decode_ids = req.origin_input_ids_unpadded[req.surr_offset :] + req.output_ids
        req.cur_decode_ids_len = len(req.output_ids)
    req.pascal_timeline = _timeline(state)
    return req


def restore_member(req: Req, state: dict[str, Any]) -> None:
    """Its place in the policy's eyes; the request's member is made already."""
    member, was = member_of(req), state["member"]
    member.pacer = _pacer(state)
    member.phase = Phase(was["phase"])
    member.phase_tokens = was["phase_tokens"]
    member.total_tokens = was["total_tokens"]
    member.credit = was["credit"]


def _timeline(state: dict[str, Any]) -> PhaseTimeline:
    was = state["timeline"]
    return PhaseTimeline(**{**was, "breaks": [Break(**each) for each in was["breaks"]]})


def _pacer(state: dict[str, Any]) -> Pacer:
    return Pacer(**state["pacer"])


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _plain(value: Any) -> Any:
    """JSON has no infinity, and log probabilities do: those become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} does not travel")


def _floats(value: Any) -> Any:
    """The reverse of `_plain`."""
    if isinstance(value, list):
        return [_floats(v) for v in value]
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {k: _floats(v) for k, v in value.items()}
    return value
