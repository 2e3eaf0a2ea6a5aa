"""Ends of held requests, and the list of SGLang's operations in the docs."""

import ast
import inspect
import re
import textwrap
from array import array
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

from pascal_sglang.engine.kv.transfers import Transfers
from pascal_sglang.engine.operations import OperationsScheduler
from tests.unit.test_request_snapshot import request

ROOT = Path(__file__).parents[2]
TIMEOUT = {
    "type": "abort",
    "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
    "message": "Request waiting timeout reached.",
}


class Ending(SimpleNamespace):
    """A scheduler that only ends requests; notes what it sends."""

    _send_last_output = OperationsScheduler._send_last_output

    def __init__(self, *, governed=True):
        self.gone, self.outputs, self.alone, self.migrations = [], [], [], None
        states = SimpleNamespace(ended=self.gone.append)
        self.plan_executor = SimpleNamespace(request_states=states) if governed else None
        self.output_streamer = SimpleNamespace(
            stream_output=lambda reqs, logprobs: self.outputs.append((reqs, logprobs))
        )

    def _send_abort_alone(self, abort, req):
        self.alone.append(req)

    def end(self, req, reason=None):
        OperationsScheduler.send_abort_output(self, AbortReq(rid="r", finished_reason=reason), req)


@pytest.mark.parametrize(
    ("reason", "marked", "expected"),
    [
        (None, None, FINISH_ABORT()),
        (TIMEOUT, None, FINISH_ABORT(TIMEOUT["message"], HTTPStatus.SERVICE_UNAVAILABLE)),
        (None, FINISH_ABORT("out of memory", 500), FINISH_ABORT("out of memory", 500)),
    ],
)
def test_an_abort_keeps_its_reason(reason, marked, expected):
    """The abort's own, or the one that the request was marked with."""
    scheduler, req = Ending(), request()
    req.to_finish = marked
    scheduler.end(req, reason)
    assert scheduler.outputs == [([req], True)]
    assert req.finished_reason.to_json() == expected.to_json()
    assert (scheduler.gone, scheduler.alone) == ([req], [])
    assert req.time_stats.completion_time > 0


def test_a_prefill_that_sglang_has_aborted_already_is_not_ended_twice():
    scheduler, req = Ending(), request()
    req.finished_reason = ended = FINISH_ABORT("failed")
    scheduler.end(req)
    assert req.finished_reason is ended
    assert scheduler.outputs


@pytest.mark.parametrize("governed", [True, False])
def test_who_has_not_begun_ends_as_in_sglang(governed):
    """So does everybody under `fcfs`."""
    scheduler, req = Ending(governed=governed), request()
    if governed:
        req.output_ids = array("q")
    scheduler.end(req)
    assert (scheduler.alone, scheduler.outputs) == ([req], [])


class Device:
    """Whose copies end when they are waited for."""

    def __init__(self):
        self.ended = []

    def query(self, kv):
        return kv in self.ended or None

    def wait(self, kv):
        self.ended.append(kv)
        return True


class Copying(OperationsScheduler):
    """A scheduler with a copy under way, whose requests hold nothing any more."""

    def __init__(self):
        alone = SimpleNamespace(attn_tp_cpu_group=SimpleNamespace(size=lambda: 1))
        self.device, self.transfers, self.done = Device(), Transfers(alone), []
        self.transfers.begin([(self.device, "kv")])
        table = SimpleNamespace(transfers=self.transfers, is_empty=lambda: True)
        states = SimpleNamespace(retract_held=lambda: self.done.append(("retracted", self.copied)))
        self.plan_executor = SimpleNamespace(paused_requests=table, request_states=states)
        self.migrations = SimpleNamespace(
            holds_no_kv=lambda: True,
            is_empty=lambda: True,
            give_up=lambda why: self.done.append((why, self.copied)),
        )

    @property
    def copied(self):
        return bool(self.device.ended)


def test_a_scheduler_is_not_idle_while_its_kv_may_be_read_or_written(monkeypatch):
    monkeypatch.setattr(Scheduler, "is_fully_idle", lambda *_: True)
    scheduler = Copying()
    assert not scheduler.is_fully_idle()
    assert scheduler.is_fully_idle(for_health_check=True), "no output will answer it"
    scheduler.device.ended.append("kv")
    scheduler.transfers.heard(*scheduler.transfers.progress())
    assert scheduler.is_fully_idle()


@pytest.mark.parametrize("ignore_waiting", [True, False])
def test_what_drops_all_kv_waits_for_copies_and_is_not_refused(monkeypatch, ignore_waiting):
    """No request runs, but a copy may be late: SGLang ends the server where it may not release
    memory."""
    monkeypatch.setattr(Scheduler, "is_fully_idle", lambda *_: True)
    scheduler = Copying()
    assert scheduler.is_fully_idle(ignore_waiting=ignore_waiting)
    assert scheduler.copied


def test_a_rank_that_drops_all_kv_alone_meets_no_other_one(monkeypatch):
    """An update of weights may fail on the others, which then flush nothing."""
    monkeypatch.setattr(Scheduler, "is_fully_idle", lambda *_: True)
    met = []
    monkeypatch.setattr(
        "pascal_sglang.engine.kv.transfers.least",
        lambda scheduler, *values: met.append(values) or [*values],
    )
    scheduler = Copying()
    assert scheduler.is_fully_idle(ignore_waiting=False)
    assert scheduler.copied
    assert met == []
    assert scheduler.transfers.progress() == (float("inf"), float("inf"))
    assert not scheduler.is_fully_idle(), "the ranks do not know it together yet"
    scheduler.transfers.heard(*scheduler.transfers.progress())
    assert scheduler.is_fully_idle()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_of_generation_waits_for_copies_which_no_pass_would(mode, monkeypatch):
    monkeypatch.setattr(Scheduler, "pause_generation", lambda *_: None)
    monkeypatch.setattr(Scheduler, "is_fully_idle", lambda *_: True)
    scheduler = Copying()
    scheduler.pause_generation(PauseGenerationReqInput(mode=mode))
    assert scheduler.is_fully_idle(ignore_waiting=True)
    retracts = [("generation paused", False), ("retracted", True)]
    assert scheduler.done == (retracts if mode == "retract" else [])


class Full(OperationsScheduler):
    """A scheduler that takes requests in, with SGLang's own look at `--max-queued-requests`."""

    def __init__(self, *, waiting, held, limit, by_priority):
        table = SimpleNamespace(in_status=lambda *_: held)
        self.plan_executor = SimpleNamespace(paused_requests=table)
        self.waiting_queue, self.max_queued_requests = [*waiting], limit
        self.enable_priority_scheduling = by_priority
        self.schedule_low_priority_values_first = False
        self.beam_coordinator = SimpleNamespace(retire_group=lambda req: None)
        self.ended = []

    def _release_aborted_request(self, req):
        pass

    def send_abort_output(self, abort_req, req):
        self.ended.append(req)


def queued(rid, *, begun=False, priority=0):
    req = request()
    req.rid, req.priority = rid, priority
    if not begun:
        req.output_ids = array("q")
    req.time_stats.wait_queue_entry_time = 1.0
    return req


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), max_size=5),
    st.integers(0, 3),
    st.integers(0, 6),
    st.booleans(),
    st.tuples(st.booleans(), st.integers(-2, 2)),
)
def test_a_full_queue_counts_the_paused_and_ends_none_that_has_begun(
    waiting, held, limit, by_priority, comes
):
    reqs = [queued(f"w{i}", begun=b, priority=p) for i, (b, p) in enumerate(waiting)]
    paused = [queued(f"p{i}", begun=True, priority=-9) for i in range(held)]
    newcomer = queued("new", begun=comes[0], priority=comes[1])
    scheduler = Full(waiting=reqs, held=paused, limit=limit, by_priority=by_priority)
    with pytest.MonkeyPatch.context() as patch:
        version = SimpleNamespace(weight_version="1")
        patch.setattr("sglang.srt.managers.scheduler.get_serving", lambda: version)
        refused = scheduler._abort_on_queued_limit(newcomer)
    fresh = [req for req in reqs if not req.output_ids]
    full = len(reqs) + held + 1 > limit and not newcomer.output_ids
    worse = [r for r in fresh if r.priority < newcomer.priority] if by_priority else []
    assert all(not req.output_ids for req in scheduler.ended)
    assert refused == (full and not worse)
    assert scheduler.ended == ([newcomer] if refused else scheduler.ended[:1])
    if full and worse:
        (ended,) = scheduler.ended
        assert ended.priority == min(r.priority for r in fresh)
    assert scheduler.waiting_queue == [req for req in reqs if req not in scheduler.ended]
    assert (scheduler.max_queued_requests, scheduler.enable_priority_scheduling) == (
        limit,
        by_priority,
    )


def test_every_update_of_weights_ends_in_the_same_flush():
    for source in ("disk", "distributed", "tensor", "ipc"):
        text = inspect.getsource(
            getattr(SchedulerWeightUpdaterManager, f"update_weights_from_{source}")
        )
        for step in ("record_weight_version_after_update(", "flush_cache_after_weight_update("):
            assert step in text, source


def test_memory_is_released_where_a_flush_succeeds():
    """It cannot be tried on a CPU: SGLang waits for a CUDA device."""
    release = inspect.getsource(SchedulerWeightUpdaterManager.release_memory_occupation)
    flush = inspect.getsource(Scheduler.flush_cache)
    assert re.search(r"is_fully_idle\(\s*ignore_waiting=.*scheduler._engine_paused\s*\)", release)
    assert "self.flush_cache()" in release
    assert "self.is_fully_idle(ignore_waiting=self._engine_paused)" in flush


def test_every_message_of_the_scheduler_is_listed():
    docs = (ROOT / "docs" / "operations.md").read_text()
    dispatcher = textwrap.dedent(inspect.getsource(Scheduler.init_request_dispatcher))
    pairs = [node for node in ast.walk(ast.parse(dispatcher)) if isinstance(node, ast.Tuple)]
    messages = {pair.elts[0].id for pair in pairs}
    assert len(messages) > 40
    assert {message for message in messages if f"`{message}`" not in docs} == set()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", docs))
    assert {name for name in named if f"def {name}(" not in tests} == set()
    tables = re.findall(r"^\| Operation.*\n\|-.*\n((?:\|.*\n)+)", docs, re.MULTILINE)
    assert len(tables) > 2
    for row in "".join(tables).splitlines():
        assert re.search(r"`test_\w+`", row), row
