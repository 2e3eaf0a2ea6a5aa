"""When a scheduler looks, forecasts and shows; the requests are none of SGLang's."""

from itertools import count
from types import SimpleNamespace

import pytest

from pascal_sglang.cluster.forecast_files import OLD_S
from pascal_sglang.engine import forecasts
from pascal_sglang.engine.forecasts import Forecasts
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import RequestState, RequestStatus

PASS_S = 0.02


class Scheduler:
    """Makes passes; `shown` is what it said in each, as (whether it is idle, requests)."""

    def __init__(self):
        self.running, self.waiting, self.shown, self.now = [], [], [], 1.0
        scheduler = SimpleNamespace(
            server_args=SimpleNamespace(reasoning_parser="qwen3"),
            collect_inflight_reqs=lambda: self.running,
            waiting_queue=self.waiting,
            running_batch=SimpleNamespace(reqs=self.running),
            max_total_num_tokens=5000,
            max_running_requests=8,
        )
        costs = SimpleNamespace(prefill_token_s=1e-4, prefill_s=0.0)
        self.states = SimpleNamespace(
            paused_requests=SimpleNamespace(in_status=lambda *_: [], costs=costs)
        )
        config = SimpleNamespace(answer_tpot_ms=100.0)
        self.forecasts = Forecasts(scheduler, config, POLICIES["pascal"], Tuning(), self.states)
        self.forecasts._file = SimpleNamespace(show=self.show)

    def show(self, now, make):
        told = make()
        self.shown.append((told["idle"], len(told["requests"])))

    def passes(self, count):
        for _ in range(count):
            self.now += PASS_S
            self.states.pass_info = PassInfo(round(self.now / PASS_S), self.now, PASS_S)
            self.forecasts.step(self.now)

    def fill(self, count):
        for number in range(count):
            runs = number < 8
            status = RequestStatus.RUNNING if runs else RequestStatus.WAITING
            state = RequestState(number, Pacer(0.1), status=status)
            state.phase_tokens = state.total_tokens = 5 * runs
            state.handle = Request(state)
            (self.running if runs else self.waiting).append(state.handle)


class Request:
    require_reasoning, origin_input_ids = True, [1] * 50
    timeline = SimpleNamespace(first_token=None)
    sampling_params = SimpleNamespace(custom_params={"pascal": {"eta_comments": True}})

    def __init__(self, state):
        self.state, self.rid = state, str(state.seq)
        self.output_ids = [1] * state.total_tokens

    def finished(self):
        return False


@pytest.fixture
def scheduler(monkeypatch):
    monkeypatch.delenv(forecasts.FOLDER_ENV, raising=False)
    monkeypatch.setattr(forecasts, "state_of", lambda req: req.state)
    monkeypatch.setattr(forecasts, "timeline_of", lambda req: req.timeline)
    monkeypatch.setattr(forecasts, "is_internal", lambda req: False)
    monkeypatch.setattr(forecasts, "remaining_of", lambda req, state: 1000)
    thinks = SimpleNamespace(thinking=True)
    monkeypatch.setattr(forecasts, "progress_of", lambda req: thinks)
    return Scheduler()


def test_an_instance_that_has_become_idle_says_so_in_its_next_pass(scheduler):
    """Once: an idle server may make no pass for a second, and refuses nobody then."""
    scheduler.passes(1)
    assert scheduler.shown == [(True, 0)]
    scheduler.passes(150)
    assert scheduler.shown == [(True, 0)]
    scheduler.fill(40)
    scheduler.passes(400)
    assert scheduler.shown[1] == (False, 40)
    scheduler.running.clear()
    scheduler.waiting.clear()
    before = len(scheduler.shown)
    scheduler.passes(1)
    assert scheduler.shown[before:] == [(True, 0)]
    scheduler.passes(150)
    assert scheduler.shown[before:] == [(True, 0)]
    assert scheduler.forecasts.errors == 0


def test_an_idle_instance_goes_on_to_forecast(scheduler):
    """Else it would expect those who came before it was idle for ever, and refuse who comes."""
    scheduler.fill(1)
    scheduler.passes(400)
    scheduler.running.clear()
    scheduler.passes(1)
    shown = len(scheduler.shown)
    scheduler.now += 3600
    scheduler.passes(1000)
    assert scheduler.forecasts.outlook.at > scheduler.now - 2 * forecasts.LATEST_S
    again = scheduler.shown[shown:]
    assert again == [(True, 0)] * len(again)
    assert len(again) <= 2 + 1000 * PASS_S / forecasts.LATEST_S


def test_long_passes_do_not_make_forecasts_old(scheduler, monkeypatch):
    """There are few of them, and each request takes a little of one."""
    ticks = count(0.0, 0.0003)
    monkeypatch.setattr(forecasts.clock, "now", lambda: next(ticks))
    monkeypatch.setattr("tests.unit.test_engine_forecasts.PASS_S", 0.3)
    scheduler.passes(2)
    scheduler.fill(5000)
    gaps, at, shown = [], scheduler.now, len(scheduler.shown)
    for _ in range(400):
        scheduler.passes(1)
        if len(scheduler.shown) > shown:
            gaps.append(scheduler.now - at)
            at, shown = scheduler.now, len(scheduler.shown)
    assert len(gaps) > 2
    assert max(gaps) < OLD_S / 2


def test_an_error_puts_forecasts_off(scheduler, monkeypatch):
    """On an idle instance, too: one a minute, not one a pass."""
    monkeypatch.setattr(scheduler.forecasts, "_outlook", lambda live: 1 / 0)
    scheduler.passes(200)
    assert (scheduler.forecasts.errors, scheduler.shown) == (1, [])
    scheduler.now += 60.0
    scheduler.passes(200)
    assert scheduler.forecasts.errors == 2
