"""A paused request in SGLang's own books: as one that was retracted."""

from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

from pascal_sglang.engine.observability.queue_times import (
    MESSAGE,
    entered_queue,
    left_queue,
    with_paused,
)
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.request import RequestState


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
    return SimpleNamespace(rid="r", time_stats=stats, pascal_state=RequestState(0, Pacer(0.1)))


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


def test_the_running_time_out_runs_from_the_first_step(clock, running):
    """`SGLANG_REQ_RUNNING_TIMEOUT` is held against this time."""
    first = running.time_stats.forward_entry_time
    entered_queue(running)
    clock.now += 5
    left_queue(running)
    assert running.time_stats.forward_entry_time == first


@pytest.fixture
def four_seconds(monkeypatch):
    monkeypatch.setenv("SGLANG_REQ_WAITING_TIMEOUT", "4")


def timed_out(aborts):
    assert {(a.abort_message, a.finished_reason["status_code"]) for a in aborts} <= {(MESSAGE, 503)}
    return [a.rid for a in aborts]


def test_the_waiting_time_out_runs_from_the_pause_on(clock, running, four_seconds):
    entered_queue(running)
    clock.now += 3.9
    assert with_paused([], [], [running]) == []
    clock.now += 0.2
    assert timed_out(with_paused([], [], [running])) == ["r"]


def test_without_a_time_out_nobody_is_looked_at(clock, running):
    entered_queue(running)
    clock.now += 1e6
    assert with_paused([], [], [running]) == []


@pytest.mark.parametrize("kept", [True, False])
def test_an_answer_waits_once_its_reader_has_caught_up(clock, running, four_seconds, kept):
    """Ten seconds of reading, paused with its KV, or without it in SGLang's waiting queue."""
    running.pascal_state.pacer.deliver(clock.now, 101)
    entered_queue(running)
    other = AbortReq(rid="o", abort_message=MESSAGE, finished_reason={"status_code": 503})

    def aborts():
        sglangs = [other]
        if not kept and clock.now - running.time_stats.wait_queue_entry_time > 4:
            sglangs.append(
                AbortReq(rid="r", abort_message=MESSAGE, finished_reason=other.finished_reason)
            )
        queues = ([], [running]) if kept else ([running], [])
        return timed_out(with_paused(sglangs, *queues))

    clock.now += 13.9
    assert aborts() == ["o"]
    clock.now += 0.2
    assert aborts() == ["o", "r"]
