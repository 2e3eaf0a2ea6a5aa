"""Everything about a running request but its KV, in MessagePack, and the request made from it on
another instance.

What becomes of each field stands in `snapshot_fields`; a request that has anything which
does not travel stays (`why_not_migratable`). The detokenizer's own state of a request stays where
it is, in the one detokenizer all instances share; the cursors into it travel.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import Annotated, Any

import msgspec
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang import clock
from pascal_sglang.cluster.codec import UNREADABLE
from pascal_sglang.cluster.messages import MAX_STATE_BYTES, Count
from pascal_sglang.engine.kv.drafts import DraftState
from pascal_sglang.engine.migration.draft_rows import DraftRow, pack
from pascal_sglang.engine.migration.snapshot_fields import (
    GIVEN,
    OUTPUT_LOGPROBS,
    PLAIN,
    PROMPT_LOGPROBS,
    TIMES,
    refused_by,
)
from pascal_sglang.engine.migration.trace_link import TraceLink, export_trace, import_trace
from pascal_sglang.engine.req_attributes import state_of, support_of, timeline_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.timeline import Break, Phase, PhaseTimeline

# Goes up with every change to what the snapshot says.
VERSION = 7

TokenIds = Annotated[list[Count], msgspec.Meta(min_length=1)]


class PolicyState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of `policy.request.RequestState`."""

    phase: Phase
    phase_tokens: Count
    total_tokens: Count
    credit: int


class ClockReading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The clock that a snapshot's times are of, and what it said when the snapshot was made."""

    name: str
    now: float


class RequestSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request but for its KV. The first four hold fields of SGLang's objects by name."""

    given: dict[str, Any]
    plain: dict[str, Any]
    logprobs: dict[str, Any]
    times: dict[str, Any]
    prompt_ids: TokenIds
    # Empty for one that has waited so far.
    output_ids: list[Count]
    sampling: SamplingParams
    top_logprobs_num: int
    token_ids_logprob: list[int] | None
    timeline: dict[str, Any]
    pacer: dict[str, Any]
    policy: PolicyState
    # Whether a grammar follows its output.
    grammar: bool
    # What a draft model keeps of it; empty without one.
    drafted: dict[str, DraftRow]
    # Of a request that SGLang traces.
    trace: TraceLink | None
    # Seconds; the reader has been kept waiting since then.
    blocked_since: float
    clock: ClockReading
    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]


class BadSnapshot(ValueError):
    """A request that cannot be continued here; the text says why, without the request's content."""


def why_not_migratable(req: Req) -> str | None:
    """What about the request cannot travel; None if all of it can."""
    return support_of(req).because or refused_by(req)


def export_state(req: Req, blocked_since: float, drafted: DraftState | None = None) -> bytes:
    """The state of a request that stands still; its reader has been kept waiting since then.
    drafted: the state of its draft model, if there is one.

    Raises: TypeError or OverflowError for a value that MessagePack does not have, ValueError for
    a text that is no valid Unicode, or for more than a message takes.
    """
    params = req.sampling_params
    custom = params.custom_params
    if isinstance(custom, dict) and "__req__" in custom:
        params = msgspec.structs.replace(
            params, custom_params={k: v for k, v in custom.items() if k != "__req__"}
        )
    mine = state_of(req)
    state = msgspec.msgpack.encode(
        RequestSnapshot(
            given={name: getattr(req, name) for name in GIVEN},
            plain={name: getattr(req, name) for name in PLAIN},
            logprobs=_logprobs(req) if req.return_logprob else {},
            times={name: getattr(req.time_stats, name) for name in TIMES},
            prompt_ids=req.origin_input_ids.tolist(),
            output_ids=req.output_ids.tolist(),
            sampling=params,
            top_logprobs_num=req.logprob.top_logprobs_num,
            token_ids_logprob=req.logprob.token_ids_logprob,
            timeline=dataclasses.asdict(timeline_of(req)),
            pacer=dataclasses.asdict(mine.pacer),
            policy=PolicyState(mine.phase, mine.phase_tokens, mine.total_tokens, mine.credit),
            grammar=req.grammar is not None,
            drafted=pack(drafted),
            trace=export_trace(req),
            blocked_since=blocked_since,
            clock=ClockReading(clock.name(), clock.now()),
            version=VERSION,
        )
    )
    if len(state) > MAX_STATE_BYTES:
        raise ValueError(f"a state of {len(state)} bytes, of at most {MAX_STATE_BYTES}")
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


def read_snapshot(state: bytes, kv_tokens: int, longest: int) -> RequestSnapshot:
    """What `export_state` wrote. longest: tokens of the longest request that this instance serves.

    Raises: `BadSnapshot` for what cannot be continued here.
    """
    try:
        snapshot = msgspec.msgpack.decode(state, type=RequestSnapshot)
        _timeline(snapshot), _pacer(snapshot)
    except (*UNREADABLE, TypeError, ValueError, KeyError) as error:
        raise BadSnapshot("state that does not read") from error
    prompt, output = len(snapshot.prompt_ids), len(snapshot.output_ids)
    # One without KV waits.
    if kv_tokens and (not output or kv_tokens != prompt + output - 1):
        raise BadSnapshot("state and KV of different lengths")
    logprobs = (*PROMPT_LOGPROBS, *OUTPUT_LOGPROBS) if snapshot.logprobs else ()
    named = {"given": GIVEN, "plain": PLAIN, "times": TIMES, "logprobs": logprobs}
    for name, keys in named.items():
        if getattr(snapshot, name).keys() != set(keys):
            raise BadSnapshot(f"state with other {name} fields")
    most = snapshot.sampling.max_new_tokens
    if most is None or prompt + most > longest:
        raise BadSnapshot("longer than this instance serves")
    return snapshot


def on_this_clock(snapshot: RequestSnapshot, heard: float) -> RequestSnapshot:
    """The snapshot, its times brought onto the clock of this process where they are of another
    host's: as if it had not been on its way at all. heard: when it came here, the same on all TP
    ranks, which are to decide alike."""
    if snapshot.clock.name == clock.name():
        return snapshot
    ahead = heard - snapshot.clock.now
    timeline, pacer = _timeline(snapshot), _pacer(snapshot)
    timeline.shift(ahead)
    pacer.shift(ahead)
    times = {
        name: value + ahead if name.endswith("_time") and value else value
        for name, value in snapshot.times.items()
    }
    return msgspec.structs.replace(
        snapshot,
        times=times,
        timeline=dataclasses.asdict(timeline),
        pacer=dataclasses.asdict(pacer),
        blocked_since=snapshot.blocked_since + ahead,
    )


def import_state(scheduler: SchedulerProtocol, snapshot: RequestSnapshot) -> Req:
    """The request that `read_snapshot` has read."""
    req = Req(
        snapshot.given["rid"],
        None,
        array("q", snapshot.prompt_ids),
        snapshot.sampling,
        **{name: value for name, value in snapshot.given.items() if name != "rid"},
        top_logprobs_num=snapshot.top_logprobs_num,
        token_ids_logprob=snapshot.token_ids_logprob,
        eos_token_ids=scheduler.model_config.hf_eos_token_id,
        vocab_size=scheduler.model_config.vocab_size,
        disagg_mode=scheduler.disaggregation_mode,
        metrics_collector=(
            scheduler.metrics_collector if scheduler.metrics_reporter.enable_metrics else None
        ),
    )
    req.tokenizer = scheduler.tokenizer
    req.output_ids = array("q", snapshot.output_ids)
    for name, value in snapshot.plain.items():
        setattr(req, name, value)
    for name, value in snapshot.times.items():
        setattr(req.time_stats, name, value)
    for name, value in snapshot.logprobs.items():
        if name in OUTPUT_LOGPROBS:
            sent, unsent = value
            value = [None] * sent + unsent
        setattr(req.logprob, name, value)
    if req.surr_offset is not None:
        # As `Req.init_incremental_detokenize` leaves them.
        req.surr_and_decode_ids = req.origin_input_ids_unpadded[req.surr_offset :] + req.output_ids
        req.cur_decode_ids_len = len(req.output_ids)
    req.pascal_timeline = _timeline(snapshot)
    return req


def restore_state(req: Req, snapshot: RequestSnapshot) -> None:
    """What the policy knows of it, whose state is made already; and its trace goes on here."""
    mine, was = state_of(req), snapshot.policy
    import_trace(req, snapshot.trace)
    mine.pacer = _pacer(snapshot)
    mine.phase = was.phase
    mine.phase_tokens = was.phase_tokens
    mine.total_tokens = was.total_tokens
    mine.credit = was.credit


def _timeline(snapshot: RequestSnapshot) -> PhaseTimeline:
    was = snapshot.timeline
    return PhaseTimeline(**{**was, "breaks": [Break(**each) for each in was["breaks"]]})


def _pacer(snapshot: RequestSnapshot) -> Pacer:
    return Pacer(**snapshot.pacer)
