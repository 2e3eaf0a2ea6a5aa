"""Reads each request's phase from SGLang's own reasoning state and times it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from pascal_sglang import clock
from pascal_sglang.cluster.internal_requests import is_internal
from pascal_sglang.engine.observability.metrics import PhaseMetrics
from pascal_sglang.engine.req_attributes import timeline_of
from pascal_sglang.policy.timeline import Phase, PhaseTimeline, Progress

RECENT = 64


def progress_of(req: Req) -> Progress:
    """The token counts of a request, from the fields `Req.update_reasoning_tokens` maintains.

    A request that asked for reasoning on a server without a reasoning parser never gets a
    reasoning token counted; it is answering from its first token on, like one that does not think.
    """
    output = req.finished_len if req.finished_len is not None else len(req.output_ids)
    reasoning = req.reasoning_tokens
    opened = reasoning > 0 or req._think_start_match_len > 0
    return Progress(
        output, reasoning if reasoning < output else output, opened and not req._is_reasoning_over
    )


class PhaseTracker:
    """Follows every request of one scheduler from arrival to its end.

    State lives on the requests, so nothing has to be cleaned up: a request that SGLang drops takes
    its timeline along. Times are seconds of `clock.now`.

    spent_s: seconds that `observe` has taken in all.
    """

    def __init__(
        self,
        metrics: PhaseMetrics | None,
        on_progress: Callable[[Sequence[Req], Sequence[Req], float], object] | None = None,
    ) -> None:
        """on_progress: told in every pass which live requests took part in it, and which of them
        ended in it, before they are reported as ended."""
        self.metrics = metrics
        self.on_progress = on_progress
        self.spent_s = 0.0
        self.outcomes: Counter[str] = Counter()
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def arrived(self, req: Req, created_time: float) -> None:
        """Start the clock: `created_time` is when the HTTP side took the request (0: unknown)."""
        req.pascal_timeline = PhaseTimeline(arrival=created_time or clock.now())

    def observe(self, reqs: Iterable[Req], now: float) -> None:
        """Account for a pass: called with the requests that may have produced tokens in it,
        which leave `now`.

        In most passes a request goes on as before, and then only its count changes. `progress_of`
        reads all of its state where its phase may change: at its first token, at the end of its
        thinking, at its first answering token, and at its end.
        """
        began = clock.now()
        live: list[Req] = []
        over: list[Req] = []
        for req in reqs:
            timeline = timeline_of(req)
            if timeline.finished is not None:
                continue
            live.append(req)
            if req.finished_reason is not None:
                over.append(req)
                timeline.observe(now, progress_of(req))
            elif timeline.first_answer is not None:
                answer_tokens = len(req.output_ids) - timeline.reasoning_tokens
                if answer_tokens > timeline.answer_tokens:
                    timeline.answer_tokens = answer_tokens
                    timeline.last_answer = now
            elif timeline.reasoning_tokens and not req._is_reasoning_over:
                timeline.reasoning_tokens = req.reasoning_tokens
            else:
                timeline.observe(now, progress_of(req))
        if self.on_progress is not None:
            self.on_progress(live, over, now)
        for req in over:
            self.ended(req, now)
        self.spent_s += clock.now() - began

    def ended(self, req: Req, now: float, aborted: bool = False) -> None:
        """Close a request's timeline, once, and report it."""
        timeline = timeline_of(req)
        if timeline.finished is not None:
            return
        timeline.finish(now)
        if is_internal(req):
            return
        if aborted or isinstance(req.finished_reason, FINISH_ABORT):
            outcome = "aborted"
        else:
            outcome = "answered" if timeline.answer_tokens else "no_answer"
        self.outcomes[outcome] += 1
        self.recent.append({**describe(req), "outcome": outcome, "took_s": timeline_of(req).took})
        if self.metrics is not None:
            self.metrics.record(timeline, outcome, qoe_of(req))


def qoe_of(req: Req) -> float | None:
    """The reader's QoE of an answer so far; None without one, or under `fcfs`."""
    state = getattr(req, "pascal_state", None)
    return state.pacer.qoe if state is not None and state.pacer.delivered else None


def describe(req: Req) -> dict[str, Any]:
    """One request for `GET /pascal/status`; times in seconds, null until they happened. Breaks are
    `[kind, start, end]` after its arrival."""
    timeline = timeline_of(req)
    began = timeline.arrival
    return {
        "rid": req.rid,
        "phase": timeline.phase.value,
        "prompt_tokens": len(req.origin_input_ids),
        "reasoning_tokens": timeline.reasoning_tokens,
        "answer_tokens": timeline.answer_tokens,
        "ttft_s": timeline.ttft,
        "reasoning_time_s": timeline.reasoning_time,
        "ttfo_s": timeline.ttfo,
        "answer_tpot_s": timeline.answer_tpot,
        "qoe": qoe_of(req),
        "breaks": [
            [b.kind, b.start - began, None if b.end is None else b.end - began]
            for b in timeline.breaks
        ],
    }


def describe_live(req: Req, now: float, status: str, name: str | None) -> dict[str, Any]:
    """One request that has not ended. status: `waiting`, `running`, `resident`, `host`, or `moving`
    between instances. name: its class. `age_s` is since its arrival."""
    about = describe(req)
    return {**about, "status": status, "class": name, "age_s": now - timeline_of(req).arrival}


def count_phases(reqs: Iterable[Req]) -> dict[str, int]:
    """How many of the given requests are in each phase."""
    counts = {Phase.REASONING.value: 0, Phase.ANSWERING.value: 0}
    for req in reqs:
        phase = timeline_of(req).phase
        if phase is not Phase.FINISHED:
            counts[phase.value] += 1
    return counts


def by_class(lengths: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Queue lengths by (class, status) for `GET /pascal/status`, without the empty ones."""
    shown: dict[str, dict[str, int]] = {}
    for (name, status), count in lengths.items():
        if count:
            shown.setdefault(name, {})[status] = count
    return shown
