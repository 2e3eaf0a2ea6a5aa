"""What of a request's trace goes with it to another instance: the trace, and the span before."""

from __future__ import annotations

from typing import Annotated

import msgspec
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.observability.trace import TraceReqContext

from pascal_sglang.engine.observability.tracing import is_traced

Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# Numbers of up to 128 bits, which MessagePack does not have.
Hexadecimal = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,32}$")]


class TraceLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state of SGLang's `TraceReqContext`, as it gives it to other processes."""

    # Headers of W3C's trace context.
    root: dict[str, str]
    # Trace and span; None before the first span.
    previous: tuple[Hexadecimal, Hexadecimal] | None
    role: str
    module_name: str
    trace_level: int
    start_time_ns: Nanoseconds | None
    bootstrap_room: int | None


def travels(req: Req) -> bool:
    """Whether the trace can go along; that of `SGLANG_TRACE_ASYNC` cannot."""
    return not is_traced(req) or type(req.time_stats.trace_ctx) is TraceReqContext


def export_trace(req: Req) -> TraceLink | None:
    """The trace of a request; None where it has none."""
    if not is_traced(req):
        return None
    state = req.time_stats.trace_ctx.__getstate__()
    if not state["tracing_enable"]:
        return None
    last = state["last_span_context"]
    return TraceLink(
        root=state["root_span_context"],
        previous=None if last is None else (f"{last['trace_id']:x}", f"{last['span_id']:x}"),
        role=state["role"],
        module_name=state["module_name"],
        trace_level=state["trace_level"],
        start_time_ns=state["start_time_ns"],
        bootstrap_room=state["bootstrap_room"],
    )


def import_trace(req: Req, link: TraceLink | None) -> None:
    """Go on with the trace here, where this process traces too."""
    if link is None:
        return
    context = TraceReqContext.__new__(TraceReqContext)
    context.tracing_enable = False
    previous = link.previous and {
        "trace_id": int(link.previous[0], 16),
        "span_id": int(link.previous[1], 16),
    }
    context.__setstate__(
        {
            "tracing_enable": True,
            "rid": req.rid,
            "bootstrap_room": link.bootstrap_room,
            "start_time_ns": link.start_time_ns,
            "role": link.role,
            "trace_level": link.trace_level,
            "module_name": link.module_name,
            "thread_context": None,
            "root_span": None,
            "root_span_context": link.root,
            "last_span_context": previous,
        }
    )
    if context.tracing_enable:
        context.rebuild_thread_context()
        end_trace(req)  # What it was made with.
        req.time_stats.trace_ctx = context


def end_trace(req: Req) -> None:
    """The request goes on elsewhere: its spans here end."""
    if is_traced(req):
        req.time_stats.trace_ctx.abort()
