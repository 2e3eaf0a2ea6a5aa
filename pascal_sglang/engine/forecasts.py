"""Forecasts of one scheduler: learns from its requests, fast-forwards a little in every pass, and
shows the outlook to the process that serves HTTP.

Only the rank that reports does so, and nothing that ranks have to agree on follows from it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from pascal_sglang import clock
from pascal_sglang.cluster.forecast_files import FOLDER_ENV, file_name
from pascal_sglang.cluster.internal_requests import is_internal
from pascal_sglang.cluster.status_file import StatusFile
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.observability.metrics import ForecastMetrics
from pascal_sglang.engine.observability.phases import progress_of
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.request_states import RequestStates, remaining_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.instances import own_instance
from pascal_sglang.policy.forecast import (
    OUTCOMES,
    Calibration,
    Estimate,
    Forecaster,
    Machine,
    Outlook,
    Present,
)
from pascal_sglang.policy.ranking import Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.request_checks import asked, thinking_budget_of

logger = logging.getLogger(__name__)

# Seconds between two looks at how far requests have come. A forecast begins as soon, or later: all
# of them together may take this share of the time for every hundred requests, but none is put off
# for longer than `LATEST_S`.
EVERY_S = 1.0
SHARE = 0.001
LATEST_S = 15.0
# Seconds of one pass that a forecast takes before it goes on in the next.
SLICE_S = 0.0005
# Requests whose own forecasts are shown, for their streams.
MOST_SHOWN = 1024


class Forecasts:
    """The forecaster of a scheduler, and its outlook."""

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        config: PascalConfig,
        policy: Policy,
        tuning: Tuning,
        request_states: RequestStates,
    ) -> None:
        """policy: without tenants, of whom a forecast knows nothing."""
        self.scheduler = scheduler
        self.request_states = request_states
        self.forecaster = Forecaster(policy, tuning, config.answer_tpot_ms / 1000)
        self.calibration = Calibration()
        self.metrics: ForecastMetrics | None = None
        self.outlook: Outlook | None = None
        self.errors = 0
        # Without a parser SGLang sees no thinking.
        self._parses = scheduler.server_args.reasoning_parser is not None
        self._file: StatusFile | None = None
        folder = os.environ.get(FOLDER_ENV)
        if folder is not None and os.path.isdir(folder):
            self._file = StatusFile(folder, file_name(own_instance()))
        self._run: Iterator[Outlook | None] | None = None
        self._spent_s = 0.0
        # Requests in the forecast under way, and whether the last one had none.
        self._size = 0
        self._shows_idle = False
        self._next_at = self._next_look = 0.0

    def retune(self, tuning: Tuning, config: PascalConfig) -> None:
        """Forecast by other values from now on; a forecast under way ends with the old ones."""
        self.forecaster.tuning, self.forecaster.tpot = tuning, config.answer_tpot_ms / 1000

    def arrived(self, req: Req) -> None:
        """A request has come."""
        with self._survived("an arrival was not learnt from"):
            if not is_internal(req):
                self._arrived(req)

    def _arrived(self, req: Req) -> None:
        now, prompt = self.request_states.pass_info.now, len(req.origin_input_ids)
        thinks = self._thinks(req)
        self.forecaster.arrivals.add(now, prompt, thinks)
        if self.outlook is not None:
            limit = remaining_of(req, state_of(req))
            estimate = self.outlook.arrival.estimate(prompt, thinks=thinks, limit=limit)
            self.calibration.arrived(state_of(req), timeline_of(req).arrival, estimate)

    @contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """An error of ours here is no reason for requests to end."""
        try:
            yield
        except Exception:
            self.errors += 1
            logger.exception("pascal_sglang: %s", what)

    def _thinks(self, req: Req) -> bool:
        """Whether a request thinks, or will before it answers."""
        if not req.output_ids:
            return bool(req.require_reasoning) and self._parses
        return progress_of(req).thinking

    def observe(self, reasoning_ended: Iterable[Req], over: Iterable[Req]) -> None:
        """Requests have ended their reasoning and go on, and others have ended."""
        with self._survived("the end of a phase was not learnt from"):
            for req in reasoning_ended:
                state, tokens = state_of(req), timeline_of(req).reasoning_tokens
                budget = thinking_budget_of(_custom(req))
                cut = budget is not None and tokens >= budget
                self.forecaster.ended(state, Phase.REASONING, tokens, cut=cut)
            for req in over:
                if not is_internal(req):
                    self._ended(req)

    def _ended(self, req: Req) -> None:
        state, timeline = state_of(req), timeline_of(req)
        if timeline.answer_tokens:
            cut = isinstance(req.finished_reason, FINISH_LENGTH | FINISH_ABORT)
            self.forecaster.ended(state, Phase.ANSWERING, timeline.answer_tokens, cut=cut)
        elif timeline.reasoning_tokens:
            self.forecaster.ended(state, Phase.REASONING, timeline.reasoning_tokens, cut=True)
        if timeline.first_answer is None:
            self.calibration.gone(state)
            return
        for made, outcome in self.calibration.began(state, timeline.first_answer):
            if self.metrics is not None:
                self.metrics.came_out(made, outcome)

    def step(self, now: float) -> None:
        """Go on with a forecast, or begin one if it is time. An error delays the next one."""
        looks = now >= self._next_look
        if self._run is None and not looks and now < self._next_at:
            return
        try:
            if looks:
                self._look(now)
            if self._run is not None or now >= self._next_at:
                self._step(now)
        except Exception:
            self.errors += 1
            self._run, self._next_at, self._next_look = None, now + 60.0, now + 60.0
            logger.exception("pascal_sglang: a forecast failed; the next one is due in a minute")

    def _step(self, now: float) -> None:
        began = clock.now()
        if self._run is None:
            self._run = self._begin()
            if not self._size and self._shows_idle:
                self._run, self._next_at, self._spent_s = None, now + EVERY_S, 0.0
                return
        outlook = None
        while outlook is None and clock.now() - began < SLICE_S:
            outlook = next(self._run)
        self._spent_s += clock.now() - began
        if outlook is None:
            return
        self._run = None
        allowed = SHARE * max(1.0, self._size / 100)
        self._next_at = now + min(max(EVERY_S, self._spent_s / allowed), LATEST_S)
        self._spent_s = 0.0
        self._show(outlook, now)

    def _live(self) -> list[Req]:
        """The users' requests that have not ended, in the order of arrival."""
        scheduler, paused = self.scheduler, self.request_states.paused_requests
        reqs = {*scheduler.collect_inflight_reqs(), *scheduler.waiting_queue}
        reqs.update(paused.in_status(*PauseStatus))
        live = [r for r in reqs if not (r.finished() or is_internal(r))]
        return sorted(live, key=lambda r: state_of(r).seq)

    def _look(self, now: float) -> None:
        began = clock.now()
        self._next_look = now + EVERY_S
        here = [state_of(r) for r in self._live()]
        self.forecaster.look(here, now)
        self.calibration.keep(set(here))
        self._spent_s += clock.now() - began

    def _begin(self) -> Iterator[Outlook | None]:
        scheduler, states = self.scheduler, self.request_states
        live = self._live()
        self._size = len(live)
        present = [
            Present(
                state=state_of(r),
                kv_tokens=len(r.origin_input_ids) + len(r.output_ids),
                limit=remaining_of(r, state_of(r)),
                thinks=float(self._thinks(r)),
            )
            for r in live
        ]
        machine = Machine(
            capacity=scheduler.max_total_num_tokens,
            slots=scheduler.max_running_requests,
            prefill_token_s=states.paused_requests.costs.prefill_token_s or 0.0,
        )
        return self.forecaster.outlook(present, machine, states.pass_info)

    def _show(self, outlook: Outlook, now: float) -> None:
        self.outlook = outlook
        self._shows_idle = not self._size
        for state, estimate in outlook.requests.items():
            if state.phase is not Phase.REASONING:
                continue  # Its thinking has ended while the forecast was made.
            first_token = timeline_of(state.handle).first_token
            self.calibration.forecast(state, outlook.at, first_token, estimate)
        if self.metrics is not None:
            usual = self._usual(outlook)
            self.metrics.show({"0.5": usual.p50, "0.9": usual.p90}, outlook.arrival.waits_s)
        if self._file is not None:
            self._file.show(now, lambda: self._told(outlook))

    def _usual(self, outlook: Outlook) -> Estimate:
        return outlook.arrival.estimate(outlook.arrival.prompt)

    def _told(self, outlook: Outlook) -> dict[str, Any]:
        """What the process that serves HTTP is told (`cluster.forecast_files`)."""
        table = self.forecaster.thinking
        following = [s for s in outlook.requests if asked(_custom(s.handle), "eta_comments")]
        return {
            "pid": os.getpid(),
            "idle": not self._size,
            "arrival": dataclasses.asdict(outlook.arrival),
            "thinking": {"P75": table.quantile(0.75), "P90": table.quantile(0.9)},
            "requests": {
                state.handle.rid: [round(s, 3) for s in outlook.requests[state][1:]]
                for state in following[:MOST_SHOWN]
            },
        }

    def describe(self) -> dict[str, Any] | None:
        """For `GET /pascal/status`; seconds and tokens. None until there is an outlook."""
        if self.outlook is None:
            return None
        table, usual = self.forecaster.thinking, self._usual(self.outlook)
        return {
            "ttfo_s": _rounded(usual),
            "backlog_s": self.outlook.arrival.waits_s,
            "thinking_tokens": {
                f"p{100 * share:.0f}": round(table.quantile(share)) for share in (0.5, 0.75, 0.9)
            },
            "thoughts_learnt": table.learnt,
            "token_s": round(self.forecaster.token_s or self.request_states.pass_info.token_s, 5),
            "outcomes": {
                made: {outcome: counts[outcome] for outcome in OUTCOMES}
                for made, counts in self.calibration.counts.items()
                if counts
            },
            "errors": self.errors,
        }

    def of(self, req: Req) -> dict[str, float] | None:
        """Seconds until the answer of a request that thinks, from now on."""
        if self.outlook is None or timeline_of(req).first_answer is not None:
            return None
        state = state_of(req)
        made = self.calibration.at_arrival(state)
        if (latest := self.outlook.requests.get(state)) is not None:
            made = self.outlook.at, latest
        if made is None:
            return None
        at, estimate = made
        passed = self.request_states.pass_info.now - at
        return _rounded(Estimate(*(max(0.0, seconds - passed) for seconds in estimate)))


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in estimate._asdict().items()}


def _custom(req: Req) -> Any:
    return req.sampling_params.custom_params
