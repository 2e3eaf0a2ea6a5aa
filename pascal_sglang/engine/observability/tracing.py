"""Waits, pauses, resumes and migrations as spans of a request's trace (`--enable-trace`)."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.observability.req_time_stats import convert_time_to_realtime_ns
from sglang.srt.observability.trace import TraceSliceContext

# As SGLang's own spans of a request's stages: `SGLANG_TRACE_LEVEL=1` shows them.
LEVEL = 1


def is_traced(req: Req) -> bool:
    traced: bool = req.time_stats.trace_ctx.tracing_enable
    return traced


def span(req: Req, name: str, began: float, ended: float, **about: str | int | float) -> None:
    """One span of the request's trace, from and to a time of `clock.now`; nothing where it is not
    traced. about: the span's attributes."""
    if is_traced(req):
        req.time_stats.trace_ctx.trace_slice(
            TraceSliceContext(
                slice_name=f"pascal_{name}",
                start_time_ns=convert_time_to_realtime_ns(began),
                end_time_ns=convert_time_to_realtime_ns(max(began, ended)),
                level=LEVEL,
                attrs=dict(about),
            )
        )
