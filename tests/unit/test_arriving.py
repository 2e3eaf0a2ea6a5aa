"""KV comes back while steps decode: its request joins one once the copy is complete."""

from types import SimpleNamespace

import pytest

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.capacity import CapacityView
from pascal_sglang.engine.kv.host_copies import HostCopy
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.outgoing_kv import OutgoingKV, find
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.request import RequestStatus
from tests.unit.test_plan_executor import FailingCopies, paused, scheduler

OWN = HostKV([])


class Batch(SimpleNamespace):
    batch_is_full = True

    def is_empty(self):
        return not self.reqs

    def merge_batch(self, other):
        self.reqs += other.reqs


class HostCopies(FailingCopies):
    deferred = True

    # Whether copies are complete, when asked or waited for.
    complete = True

    def __init__(self):
        self.held, self.waited = [], []

    def query(self, half):
        return True if self.complete else None

    def wait(self, half):
        self.waited.append(half)
        return self.complete

    def hold_steps(self, half):
        self.held.append(half)

    def free(self, half):
        assert half is OWN


@pytest.fixture
def executor(monkeypatch):
    batch_of = lambda reqs, *_: Batch(reqs=[*reqs])  # noqa: E731
    monkeypatch.setattr("pascal_sglang.engine.kv.paused.decoding", batch_of)
    config = PascalConfig()
    made = PlanExecutor(scheduler(), config, config.record, HostCopies(), Costs())
    monkeypatch.setattr(made.paused_requests, "_to_device", lambda req, copy: True)
    return made


def in_host_memory(executor):
    request = paused()
    request.finished = lambda: False
    request.kv.holds_kv = True
    executor.paused_requests._enter(request, PauseStatus.HOST, copy=HostCopy(10, 0, None, OWN))
    executor.paused_requests.host_tokens = 10
    return request


def arrive(executor, running, **options):
    return executor.paused_requests.arrive(running, executor.request_states.lost, **options)


def next_pass(executor):
    """The ranks say what they know."""
    transfers = executor.paused_requests.transfers
    transfers.heard(*transfers.progress())


def test_it_joins_once_its_copy_is_complete_while_others_decode(executor):
    paused_requests, request, running = (
        executor.paused_requests,
        in_host_memory(executor),
        Batch(reqs=["other"]),
    )
    paused_requests.copies.complete = False
    assert paused_requests.resume(request)
    assert paused_requests.in_status(*PauseStatus) == [request]
    assert paused_requests.status_of(request) is PauseStatus.ARRIVING
    assert (paused_requests.host_tokens, paused_requests.is_empty()) == (0, False)
    next_pass(executor)
    assert arrive(executor, running).reqs == ["other"]
    paused_requests.copies.complete = True
    assert arrive(executor, running).reqs == ["other"], "other ranks may not know yet"
    next_pass(executor)
    assert arrive(executor, running) is running
    assert running.reqs == ["other", request]
    assert not running.batch_is_full
    assert paused_requests.copies.waited == [], "nobody waits for it"
    assert paused_requests.is_empty()


@pytest.mark.parametrize("alone", [True, False])
def test_it_joins_at_once_if_nobody_decodes_or_copies_do_not_run_beside(executor, alone):
    paused_requests, request = executor.paused_requests, in_host_memory(executor)
    paused_requests.copies.deferred = alone
    running = Batch(reqs=[] if alone else ["other"])
    assert paused_requests.resume(request)
    assert request in arrive(executor, running, wait=alone).reqs
    assert paused_requests.copies.waited == [OWN]
    assert paused_requests.is_empty()


def test_all_that_come_back_in_a_pass_make_one_batch(executor, monkeypatch):
    made = []
    monkeypatch.setattr(
        "pascal_sglang.engine.kv.paused.decoding",
        lambda reqs, *_: made.append(reqs) or Batch(reqs=[*reqs]),
    )
    requests = [in_host_memory(executor) for _ in range(3)]
    for request in requests:
        assert executor.paused_requests.resume(request)
    assert arrive(executor, Batch(reqs=[]), wait=True).reqs == requests
    assert made == [requests]


def test_an_abort_finds_it_and_whoever_gets_its_memory_waits_for_the_copy(executor, monkeypatch):
    paused_requests, request, released = executor.paused_requests, in_host_memory(executor), []
    monkeypatch.setattr(paused_requests.pool, "release", released.append)
    paused_requests.resume(request)
    assert paused_requests.forget(lambda req: True) == [request]
    assert released == [request]
    assert paused_requests.copies.held == [OWN]
    assert paused_requests.is_empty()


def test_a_move_waits_for_it(executor):
    paused_requests, request = executor.paused_requests, in_host_memory(executor)
    paused_requests.resume(request)
    executor.scheduler.running_batch = Batch(reqs=[])
    assert find("r", executor.scheduler, paused_requests) is request
    leaving = OutgoingKV(
        req=request, paused_requests=paused_requests, transport=None, serializer=None, tp_rank=0
    )
    assert leaving.status(set()) is None


def test_a_policy_that_fails_right_after_loses_nobody(executor, monkeypatch):
    """The batch that it was to run in was empty, and is another one now."""
    request = in_host_memory(executor)
    executor.paused_requests.resume(request)

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(executor.planner, "is_content", fail)
    monkeypatch.setattr(CapacityView, "spare_tokens", lambda *_: 0)
    running = executor.govern(Batch(reqs=[]), None)
    assert running.reqs == [request]
    assert executor.errors == 1


def test_one_whose_copy_fails_on_any_rank_gives_all_back_and_is_prefilled_again(
    executor, monkeypatch
):
    paused_requests, request, done = executor.paused_requests, in_host_memory(executor), []
    request.kv.kv_committed_len, request.reset_for_retract = 10, lambda: done.append("reset")
    request.sampling_params = SimpleNamespace(max_new_tokens=20, custom_params=None)
    request.time_stats = SimpleNamespace(
        last_forward_entry_time=0.0, set_forward_entry_time=lambda: None
    )
    monkeypatch.setattr(executor.decision_log, "started", lambda *_: None)
    monkeypatch.setattr(executor.decision_log, "resumed", lambda *_: None)
    monkeypatch.setattr(paused_requests.copies, "wait", lambda half: done.append(half))
    monkeypatch.setattr(paused_requests.copies, "query", lambda half: False)
    monkeypatch.setattr(paused_requests.pool, "release", done.append)
    monkeypatch.setattr(paused_requests, "can_resume", lambda *_: True)
    monkeypatch.setattr(CapacityView, "promised_tokens", lambda _: 0)
    executor.request_states.stopped(request, RequestStatus.HOST)
    monkeypatch.setattr(executor.decision_log, "left_device", lambda *_: None)
    assert executor._resume(request, Batch(reqs=["other"]), 0)
    next_pass(executor)
    assert arrive(executor, Batch(reqs=["other"])).reqs == ["other"]
    assert done == [OWN, request, "reset"], "its memory is free once nothing is written there"
    assert executor.scheduler.waiting_queue == [request]
    assert request.pascal_state.status is RequestStatus.WAITING
    assert (paused_requests.host_tokens, paused_requests.is_empty()) == (0, True)
    assert paused_requests.counts["copy_failed"] == 1
