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
from itertools import chain
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
from pascal_sglang.policy import fast_forward
from pascal_sglang.policy.calibration import Calibration
from pascal_sglang.policy.fairness import TenantCounters
from pascal_sglang.policy.fast_forward import Machine, Present
from pascal_sglang.policy.forecast import PORTION, Forecaster
from pascal_sglang.policy.forecast_errors import OUTCOMES, Estimate
from pascal_sglang.policy.outlook import Outlook
from pascal_sglang.policy.ranking import Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.request_checks import asked, thinking_budget_of

logger = logging.getLogger(__name__)

# Seconds between two looks at how far requests have come. A forecast begins as soon, or later: all
# of them together may take this share of the time for every hundred requests, but none is put off
# for longer than `LATEST_S`.
EVERY_S = 1.0
SHARE = 0.001
LATEST_S = 15.0
# Seconds of one pass that a forecast takes before it goes on in the next. Of long passes it takes
# that share, and `MOST_SLICE_S` at most: they are few, and it would be old once it is made.
SLICE_S, SLICE_SHARE, MOST_SLICE_S = 0.0005, 0.01, 0.005
# Requests whose own forecasts are shown, for their streams.
MOST_SHOWN = 1024
# What a look or a forecast that has ended gives.
OVER = object()


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
        """policy: as it is without tenants."""
        self.scheduler = scheduler
        self.request_states = request_states
        self.forecaster = Forecaster(policy, tuning, config.answer_tpot_ms / 1000)
        self.calibration = Calibration(errors=self.forecaster.errors)
        self.metrics: ForecastMetrics | None = None
        self.outlook: Outlook | None = None
        self.errors = 0
        # Without a parser SGLang sees no thinking.
        self._parses = scheduler.server_args.reasoning_parser is not None
        self._file: StatusFile | None = None
        folder = os.environ.get(FOLDER_ENV)
        if folder is not None and os.path.isdir(folder):
            # Each of them: the one of an idle instance is the last.
            self._file = StatusFile(folder, file_name(own_instance()), every_s=0.0)
        # A look, or a forecast, that goes on in the next pass.
        self._run: Iterator[None] | None = None
        # What looks and the forecast have taken since the last one.
        self._spent_s = 0.0
        # Requests in the forecast under way or made last, and whether the one shown had none.
        self._size = 0
        self._shows_idle = False
        self._next_at = self._next_look = self._not_before = self._stepped_at = 0.0

    def retune(self, tuning: Tuning, config: PascalConfig, tenants: TenantCounters | None) -> None:
        """Forecast by other values from now on; a forecast under way ends with the old ones.
        tenants: None where they are not told apart."""
        self.forecaster.tuning, self.forecaster.tpot = tuning, config.answer_tpot_ms / 1000
        self.forecaster.tenants = tenants

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
            arrival = self.outlook.by_tenant.get(state_of(req).tenant, self.outlook.arrival)
            estimate = arrival.estimate(prompt, thinks=thinks, limit=limit)
            at, course = timeline_of(req).arrival, arrival.course(prompt)
            self.calibration.forecast(state_of(req), at, estimate, course)

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
        began = self.calibration.began(state, timeline.first_answer, timeline.reasoning_tokens)
        for made, outcome in began:
            if self.metrics is not None:
                self.metrics.came_out(made, outcome)

    def step(self, now: float) -> None:
        """Go on with a look or a forecast, or begin one if it is time. An error delays the next
        one."""
        slice_s = min(max(SLICE_S, SLICE_SHARE * (now - self._stepped_at)), MOST_SLICE_S)
        self._stepped_at = now
        if now < self._not_before:
            return
        try:
            if not self._shows_idle and self._is_idle():
                # At once: it takes no turn from anybody, and an idle server may make no pass for a
                # second.
                for _ in self._forecast():
                    pass
                self._run = None
            if self._run is None:
                if now >= self._next_look:
                    self._run = self._look()
                elif now >= self._next_at:
                    self._run = self._forecast()
                else:
                    return
            self._go_on(slice_s)
        except Exception:
            self.errors += 1
            self._run, self._not_before = None, now + 60.0
            logger.exception("pascal_sglang: a forecast failed; the next one is due in a minute")

    def _go_on(self, slice_s: float) -> None:
        assert self._run is not None
        began = spent = clock.now()
        while spent - began < slice_s:
            over = next(self._run, OVER) is OVER
            spent = clock.now()
            if over:
                self._run = None
                break
        self._spent_s += spent - began

    def _is_idle(self) -> bool:
        scheduler = self.scheduler
        if scheduler.running_batch.reqs or scheduler.waiting_queue:
            return False
        return next(self._live(), None) is None

    def _live(self) -> Iterator[Req]:
        """The users' requests that were here when this was called, and have not ended."""
        scheduler, paused = self.scheduler, self.request_states.paused_requests
        reqs = {*scheduler.collect_inflight_reqs(), *scheduler.waiting_queue}
        reqs.update(paused.in_status(*PauseStatus))
        return (r for r in reqs if not (r.finished() or is_internal(r)))

    def _look(self) -> Iterator[None]:
        """Learn from how far requests have come."""
        followed, here = self.calibration.followed(), set[RequestState]()

        def present() -> Iterator[RequestState]:
            for req in self._live():
                here.add(state := state_of(req))
                yield state

        states = self.request_states
        costs = states.paused_requests.costs
        yield from self.forecaster.looking(present(), lambda: states.pass_info.now, costs)
        for state in followed - here:
            self.calibration.gone(state)
        # From its end on: a look at very many requests takes longer than that.
        self._next_look = self.request_states.pass_info.now + EVERY_S

    def _forecast(self) -> Iterator[None]:
        live = self._live()
        first = next(live, None)
        self._size = 0
        now = self.request_states.pass_info.now
        # Of those who came before it was idle fewer are expected again, the longer it is.
        if first is None and self._shows_idle and self.outlook and now - self.outlook.at < LATEST_S:
            self._next_at, self._spent_s = now + EVERY_S, 0.0
            return
        for outlook in self._outlook(live if first is None else chain([first], live)):
            if outlook is not None:
                yield from self._show(outlook)
            yield
        now, allowed = self.request_states.pass_info.now, SHARE * max(1.0, self._size / 100)
        self._next_at = now + min(max(EVERY_S, self._spent_s / allowed), LATEST_S)
        self._spent_s = 0.0

    def _outlook(self, live: Iterable[Req]) -> Iterator[Outlook | None]:
        scheduler, states = self.scheduler, self.request_states
        machine = Machine(
            capacity=scheduler.max_total_num_tokens,
            slots=scheduler.max_running_requests,
            prefill_token_s=states.paused_requests.costs.prefill_token_s or 0.0,
        )
        present = self._present(live)
        return fast_forward.outlook(self.forecaster, present, machine, states.pass_info)

    def _present(self, live: Iterable[Req]) -> Iterator[Present]:
        now = self.request_states.pass_info.now
        for req in live:
            self._size += 1
            first_token = timeline_of(req).first_token
            yield Present(
                state=state_of(req),
                kv_tokens=len(req.origin_input_ids) + len(req.output_ids),
                limit=remaining_of(req, state_of(req)),
                thinks=float(self._thinks(req)),
                thinks_s=None if first_token is None else now - first_token,
            )

    def _show(self, outlook: Outlook) -> Iterator[None]:
        self.outlook = outlook
        self._shows_idle = not self._size
        following: list[RequestState] = []
        for number, (state, estimate) in enumerate(outlook.requests.items(), 1):
            if state.phase is Phase.REASONING:  # Otherwise its thinking has ended meanwhile.
                course = outlook.courses[state]
                self.calibration.forecast(state, outlook.at, estimate, course)
            if asked(_custom(state.handle), "eta_comments"):
                following.append(state)
            if number % PORTION == 0:
                yield
        if self.metrics is not None:
            usual = self._usual(outlook)
            self.metrics.show({"0.5": usual.p50, "0.9": usual.p90}, outlook.usual.waits_s)
        if self._file is not None:
            now = self.request_states.pass_info.now
            self._file.show(now, lambda: self._told(outlook, following[:MOST_SHOWN]))

    def _usual(self, outlook: Outlook) -> Estimate:
        return outlook.usual.estimate(outlook.usual.prompt)

    def _told(self, outlook: Outlook, following: list[RequestState]) -> dict[str, Any]:
        """What the process that serves HTTP is told (`cluster.forecast_files`)."""
        table = self.forecaster.thinking
        by_tenant = outlook.by_tenant.items()
        return {
            "pid": os.getpid(),
            "idle": not self._size,
            "arrival": dataclasses.asdict(outlook.arrival),
            "by_tenant": {tenant: dataclasses.asdict(each) for tenant, each in by_tenant},
            "thinking": {"P75": table.quantile(0.75), "P90": table.quantile(0.9)},
            "requests": {
                state.handle.rid: [round(s, 3) for s in outlook.requests[state][1:]]
                for state in following
            },
        }

    def describe(self) -> dict[str, Any] | None:
        """For `GET /pascal/status`; seconds and tokens. None until there is an outlook."""
        if self.outlook is None:
            return None
        table, usual = self.forecaster.thinking, self._usual(self.outlook)
        return {
            "ttfo_s": _rounded(usual),
            "backlog_s": self.outlook.usual.waits_s,
            "backlog_share": round(self.outlook.usual.waits, 3),
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
        if (latest := self.outlook.requests.get(state)) is not None:
            at, estimate = self.outlook.at, latest
        elif (made := self.calibration.at_arrival(state)) is not None:
            at, estimate = made.at, made.estimate
        else:
            return None
        passed = self.request_states.pass_info.now - at
        return _rounded(Estimate(*(max(0.0, seconds - passed) for seconds in estimate)))


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in estimate._asdict().items()}


def _custom(req: Req) -> Any:
    return req.sampling_params.custom_params
