"""Everything about a running request but its KV, as plain JSON values, and the request made from it
on another instance.

What becomes of each field stands in `snapshot_fields`; a request that has anything which
does not travel stays (`why_not_migratable`). The detokenizer's own state of a request stays where
it is, in the one detokenizer all instances share; the cursors into it travel.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from typing import Any

import msgspec
import orjson
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang import support
from pascal_sglang.cluster.messages import MAX_STATE_BYTES
from pascal_sglang.engine.migration.snapshot_fields import (
    GIVEN,
    OUTPUT_LOGPROBS,
    PLAIN,
    PROMPT_LOGPROBS,
    TIMES,
    refused_by,
)
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.timeline import Break, Phase, PhaseTimeline

VERSION = 2

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
        "policy",
        "blocked_since",
    }
)


def why_not_migratable(req: Req) -> str | None:
    """What about the request cannot travel; None if all of it can."""
    return support.first(support.REQUESTS, req) or refused_by(req)


def export_state(req: Req, blocked_since: float) -> dict[str, Any]:
    """The state of a request that stands still; its reader has been kept waiting since then.

    Raises: TypeError for a value that JSON does not have, ValueError for more than a message takes.
    """
    params = req.sampling_params
    custom = params.custom_params
    if isinstance(custom, dict) and "__req__" in custom:
        params = msgspec.structs.replace(
            params, custom_params={k: v for k, v in custom.items() if k != "__req__"}
        )
    mine = state_of(req)
    state = {
        "version": VERSION,
        "given": {name: getattr(req, name) for name in GIVEN},
        "plain": {name: getattr(req, name) for name in PLAIN},
        "logprobs": _plain(_logprobs(req)) if req.return_logprob else {},
        "times": {name: getattr(req.time_stats, name) for name in TIMES},
        "prompt_ids": req.origin_input_ids.tolist(),
        "output_ids": req.output_ids.tolist(),
        "sampling": _plain(msgspec.to_builtins(params)),
        "top_logprobs_num": req.logprob.top_logprobs_num,
        "token_ids_logprob": req.logprob.token_ids_logprob,
        "timeline": dataclasses.asdict(timeline_of(req)),
        "pacer": dataclasses.asdict(mine.pacer),
        "policy": {
            "phase": mine.phase.value,
            "phase_tokens": mine.phase_tokens,
            "total_tokens": mine.total_tokens,
            "credit": mine.credit,
        },
        "blocked_since": blocked_since,
    }
    if (size := len(orjson.dumps(state))) > MAX_STATE_BYTES:
        raise ValueError(f"a state of {size} bytes, of at most {MAX_STATE_BYTES}")
    return state


def _logprobs(req: Req) -> dict[str, Any]:
    """The lists that SGLang still reads. Of the prompt's, once they are sent, it reads only that
    they are there: it would collect them again in a second prefill. Of each token's, those that are
    not sent yet; how many stand before them."""
    values: dict[str, Any] = {}
    for name in PROMPT_LOGPROBS:
        value = getattr(req.logprob, name)
        values[name] = [] if req.input_logprob_sent and value is not None else value
    for name in OUTPUT_LOGPROBS:
        made = getattr(req.logprob, name)
        sent = min(req.send_output_token_logprobs_offset, len(made))
        values[name] = [sent, made[sent:]]
    return values


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
    logprobs = (*PROMPT_LOGPROBS, *OUTPUT_LOGPROBS) if state["logprobs"] else ()
    named = {"given": GIVEN, "plain": PLAIN, "times": TIMES, "logprobs": logprobs}
    for name, keys in named.items():
        if not isinstance(state[name], dict) or state[name].keys() != set(keys):
            return f"state with other {name} fields"
    try:
        params = msgspec.convert(_floats(state["sampling"]), SamplingParams)
        _timeline(state), _pacer(state), Phase(state["policy"]["phase"])
    except (msgspec.ValidationError, TypeError, ValueError, KeyError) as error:
        return f"state that does not read: {type(error).__name__}"
    if params.max_new_tokens is None or len(prompt) + params.max_new_tokens > longest:
        return "longer than this instance serves"
    return None


def import_state(scheduler: SchedulerProtocol, state: dict[str, Any]) -> Req:
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
        if name in OUTPUT_LOGPROBS:
            sent, unsent = value
            value = [None] * sent + unsent
        setattr(req.logprob, name, value)
    if req.surr_offset is not None:
        # As `Req.init_incremental_detokenize` leaves them.
        req.surr_and_decode_ids = req.origin_input_ids_unpadded[req.surr_offset :] + req.output_ids
        req.cur_decode_ids_len = len(req.output_ids)
    req.pascal_timeline = _timeline(state)
    return req


def restore_state(req: Req, state: dict[str, Any]) -> None:
    """What the policy knows of it; the request's state is made already."""
    mine, was = state_of(req), state["policy"]
    mine.pacer = _pacer(state)
    mine.phase = Phase(was["phase"])
    mine.phase_tokens = was["phase_tokens"]
    mine.total_tokens = was["total_tokens"]
    mine.credit = was["credit"]


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
