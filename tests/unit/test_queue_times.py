"""A paused request in SGLang's own books: as one that was retracted."""

from types import SimpleNamespace

import pytest
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

from pascal_sglang.engine import queue_times
from pascal_sglang.engine.queue_times import MESSAGE, entered_queue, left_queue, waiting_timeouts


class Clock:
    """The clock of SGLang's time stats."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        "sglang.srt.observability.req_time_stats.time.perf_counter", clock.perf_counter
    )
    return clock


@pytest.fixture
def running(clock):
    """A request that waited for 2 s and has run for 3."""
    stats = SchedulerReqTimeStats()
    stats.set_wait_queue_entry_time()
    clock.now += 2
    stats.set_forward_entry_time()
    clock.now += 3
    return SimpleNamespace(rid="r", time_stats=stats)


def test_a_pause_is_queue_time(clock, running):
    entered_queue(running)
    clock.now += 5
    left_queue(running)
    clock.now += 7
    left_queue(running)
    assert running.time_stats.get_queueing_time() == pytest.approx(2 + 5)


def test_a_wait_that_goes_on_elsewhere_is_one_wait(clock, running):
    """Its KV leaves the device, or its move is given up: it has waited since it was paused."""
    entered_queue(running)
    clock.now += 5
    entered_queue(running)
    clock.now += 1
    running.time_stats.set_forward_entry_time()  # SGLang's own prefill.
    assert running.time_stats.get_queueing_time() == pytest.approx(2 + 6)


def test_the_waiting_time_out_runs_from_the_pause_on(clock, running, monkeypatch):
    assert waiting_timeouts([running]) == [], "no time-out is set"
    monkeypatch.setenv("SGLANG_REQ_WAITING_TIMEOUT", "4")
    entered_queue(running)
    clock.now += 3.9
    assert waiting_timeouts([running]) == []
    clock.now += 0.2
    (abort,) = waiting_timeouts([running])
    assert (abort.rid, abort.abort_message) == ("r", MESSAGE)
    assert abort.finished_reason["status_code"] == 503
    assert queue_times.envs.SGLANG_REQ_WAITING_TIMEOUT.get() == 4
