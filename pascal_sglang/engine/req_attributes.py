"""What this package attaches to SGLang's `Req`: its timeline, its state, and what
it gets. All go with it."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang import clock
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import PhaseTimeline
from pascal_sglang.support import Support


def timeline_of(req: Req) -> PhaseTimeline:
    """The timeline of a request; made on first use for requests that SGLang built itself."""
    timeline: PhaseTimeline
    try:
        timeline = req.pascal_timeline
    except AttributeError:
        timeline = req.pascal_timeline = PhaseTimeline(arrival=clock.now())
    return timeline


def state_of(req: Req) -> RequestState:
    """The policy's state of a request; there is one under every policy but `fcfs`."""
    state: RequestState = req.pascal_state
    return state


def support_of(req: Req) -> Support:
    """What its kind and its server leave of a request, as decided when it arrived."""
    support: Support = req.pascal_support
    return support
