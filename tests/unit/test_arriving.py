"""KV comes back while a step decodes: its request joins the next one, which waits for the copy."""

from types import SimpleNamespace

import pytest

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.host_copies import HostCopy, HostKV
from pascal_sglang.engine.migration.outgoing_migration import Outgoing, find
from pascal_sglang.engine.plan_executor import Governor
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.request import Place
from tests.unit.test_governor import FailingCopies, paused, scheduler

OWN = HostKV([])


class Batch(SimpleNamespace):
    batch_is_full = True

    def is_empty(self):
        return not self.reqs

    def merge_batch(self, other):
        self.reqs += other.reqs


class Copies(FailingCopies):
    deferred = True

    def __init__(self):
        self.held = []

    def hold_steps(self, half):
        self.held.append(half)

    def free(self, half):
        assert half is OWN


@pytest.fixture
def governor(monkeypatch):
    monkeypatch.setattr("pascal_sglang.engine.plan_executor.agree", lambda _, now: now)
    monkeypatch.setattr("pascal_sglang.engine.kv.paused.decoding", lambda req, _: Batch(reqs=[req]))
    made = Governor(scheduler(), PascalConfig(), Copies(), Costs())
    monkeypatch.setattr(made.ladder, "_to_device", lambda req, copy: True)
    return made


def in_host_memory(governor):
    request = paused()
    request.finished = lambda: False
    request.kv.holds_kv = True
    governor.ladder.host[request] = HostCopy(10, 0, None, OWN)
    governor.ladder.host_tokens = 10
    return request


def test_it_joins_a_pass_later_while_others_decode(governor):
    ladder, request, running = governor.ladder, in_host_memory(governor), Batch(reqs=["other"])
    assert ladder.resume(request, running) is running
    assert running.reqs == ["other"]
    assert ladder.copies.held == [], "this step does not wait"
    assert list(ladder.arriving) == [request]
    assert (ladder.host, ladder.host_tokens, ladder.is_empty()) == ({}, 0, False)
    assert ladder.arrive(running) is running
    assert running.reqs == ["other", request]
    assert not running.batch_is_full
    assert ladder.copies.held == [OWN]
    assert ladder.is_empty()


@pytest.mark.parametrize("alone", [True, False])
def test_it_joins_at_once_if_nobody_decodes_or_copies_do_not_run_beside(governor, alone):
    ladder, request = governor.ladder, in_host_memory(governor)
    ladder.copies.deferred = alone
    running = Batch(reqs=[] if alone else ["other"])
    assert request in ladder.resume(request, running).reqs
    assert ladder.copies.held == [OWN]
    assert ladder.is_empty()


def test_an_abort_finds_it_and_whoever_gets_its_memory_waits_for_the_copy(governor, monkeypatch):
    ladder, request, released = governor.ladder, in_host_memory(governor), []
    monkeypatch.setattr(ladder.pool, "release", released.append)
    ladder.resume(request, Batch(reqs=["other"]))
    assert ladder.forget(lambda req: True) == [request]
    assert released == [request]
    assert ladder.copies.held == [OWN]
    assert ladder.is_empty()


def test_a_move_waits_for_it(governor):
    ladder, request = governor.ladder, in_host_memory(governor)
    ladder.resume(request, Batch(reqs=["other"]))
    governor.scheduler.running_batch = Batch(reqs=[])
    assert find("r", governor.scheduler, ladder) is request
    assert Outgoing(request, 1, ladder, 0.0).place(set()) is None


def test_a_policy_that_fails_right_after_loses_nobody(governor, monkeypatch):
    """The batch that it was to run in was empty, and is another one now."""
    request = in_host_memory(governor)
    governor.ladder.resume(request, Batch(reqs=["other"]))

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(governor.planner, "is_content", fail)
    monkeypatch.setattr(governor.view, "spare_tokens", lambda *_: 0)
    running = governor.govern(Batch(reqs=[]), None)
    assert running.reqs == [request]
    assert governor.errors == 1


def test_one_whose_copy_fails_on_any_rank_gives_all_back_and_is_prefilled_again(
    governor, monkeypatch
):
    ladder, request, done = governor.ladder, in_host_memory(governor), []
    request.kv.kv_committed_len, request.reset_for_retract = 10, lambda: done.append("reset")
    request.sampling_params = SimpleNamespace(max_new_tokens=20, custom_params=None)
    request.time_stats = SimpleNamespace(last_forward_entry_time=0.0)
    monkeypatch.setattr(ladder.copies, "wait", lambda half: done.append(half), raising=False)
    monkeypatch.setattr(ladder.pool, "release", done.append)
    monkeypatch.setattr(ladder, "can_resume", lambda *_: True)
    monkeypatch.setattr(governor.view, "promised_tokens", lambda: 0)
    governor.stopped(request, Place.HOST)
    monkeypatch.setattr("pascal_sglang.engine.kv.paused.all_agree", lambda _, holds: False)
    monkeypatch.setattr(governor.journal, "left_device", lambda *_: None)
    assert governor._resume(request, Batch(reqs=["other"]), 0) is None
    assert done == [OWN, request, "reset"], "its memory is free once nothing is written there"
    assert governor.scheduler.waiting_queue == [request]
    assert request.pascal_member.place is Place.WAITING
    assert (ladder.host_tokens, ladder.is_empty()) == (0, True)
    assert ladder.counts["copy_failed"] == 1
