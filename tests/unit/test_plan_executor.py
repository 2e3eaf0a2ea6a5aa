"""When something of ours fails at run time, SGLang's order stands in and no request is lost."""

import dataclasses
from array import array
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang import support
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.host_copies import HostCopy
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.request_snapshot import why_not_migratable
from pascal_sglang.engine.observability.decision_log import DecisionLog
from pascal_sglang.engine.observability.phases import PhaseTracker
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.engine.req_attributes import support_of
from pascal_sglang.engine.request_states import remaining_of
from pascal_sglang.policy.kv_tier import Costs, KVTier
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.support import MULTIMODAL, Level


class Rows:
    """Request rows, or none to give."""

    def __init__(self, rows):
        self.rows = rows
        self.given = []

    def available_size(self):
        return self.rows

    def alloc(self, reqs):
        if not self.rows:
            return None
        self.given += reqs
        return list(range(len(reqs)))


class Tree:
    """A prefix cache that holds nothing."""

    def root_node_handle(self, extra_key):
        return None

    def match_prefix(self, params):
        return SimpleNamespace(device_prefix_len=0)

    def swa_reprefill_tail_tokens(self, req):
        return 0

    def unlock(self, lock):
        assert lock is None

    def evictable_size(self):
        return 0

    def supports_prefix_sharing(self):
        return False


class Allocator:
    """KV memory of that many entries, which cannot be copied."""

    device = "cpu"

    def __init__(self, entries=0):
        self.entries = entries

    def evict_to_free_tokens(self, tree, tokens):
        pass

    def alloc(self, entries):
        if entries > self.entries:
            return None
        self.entries -= entries
        return torch.arange(entries)

    def free_segments(self, segments):
        self.entries += sum(len(locations) for locations, _ in segments)

    def available_size(self):
        return self.entries


class FailingCopies:
    """Host memory for 100 tokens, and a device that copies none."""

    deferred = by_row = False
    states = None
    room = 100
    together = staticmethod(nullcontext)

    def save(self, _, locations, held):
        self.room -= len(locations)
        return HostCopy(len(locations), 0, None, len(locations))

    def wait(self, _):
        return False

    def free(self, tokens):
        self.room += tokens

    def parts_of(self, copy):
        return [(self, copy.own)]


def scheduler(rows=1, entries=0):
    return SimpleNamespace(
        waiting_queue=[],
        req_to_token_pool=Rows(rows),
        token_to_kv_pool_allocator=Allocator(entries),
        tree_cache=Tree(),
        page_size=1,
        attn_tp_cpu_group=SimpleNamespace(size=lambda: 1),
        enable_overlap=True,
        device="cpu",
        enable_lora=False,
        last_batch=None,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )


class Paused(SimpleNamespace):
    __hash__ = object.__hash__


def paused():
    return Paused(
        rid="r",
        origin_input_ids=[1, 2],
        output_ids=[3],
        extra_key=None,
        cache_salt=None,
        pascal_state=RequestState(0, Pacer(0.1)),
        kv=SimpleNamespace(cache_protected_len=0),
    )


@pytest.fixture
def executor():
    config = PascalConfig()
    return PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs())


def test_the_answer_bias_moves_how_far_ahead_answers_may_be_displaced():
    """`test_plan` shows what `settle` does."""
    config = PascalConfig(answer_bias=0.25)
    made = PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs())
    assert made.planner.tuning == dataclasses.replace(Tuning(), settle=Tuning().settle / 4)


def test_a_failing_policy_is_counted_and_everybody_admitted(executor, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(executor, "_carry_out", fail)
    waiting = [paused() for _ in range(3)]
    waiting[1].pascal_state.priority = -1
    executor.scheduler.waiting_queue += waiting
    running = SimpleNamespace(reqs=[])
    assert executor.govern(running, None) is running
    assert executor.errors == 1
    assert executor.admission.plan == [waiting[1], waiting[0], waiting[2]]


def test_the_time_of_observing_requests_is_time_of_the_policy(executor, monkeypatch):
    monkeypatch.setattr(executor, "_carry_out", lambda running, last: None)
    told = []
    executor.decision_log.metrics = SimpleNamespace(
        update=lambda totals, *_: told.append(totals), waiting=lambda _: None
    )
    executor.phase_tracker = PhaseTracker(None)
    executor.phase_tracker.observe([], 0.0)
    observed = executor.phase_tracker.spent_s
    executor.govern(SimpleNamespace(reqs=[]), None)
    assert observed > 0
    assert told[0]["seconds"] == executor.policy_s + observed


@pytest.mark.parametrize(("device", "passes"), [("cpu", 1), ("cuda", 2)])
def test_a_prefill_is_timed_when_its_result_was_waited_for(executor, monkeypatch, device, passes):
    executor.scheduler.device = device
    monkeypatch.setattr(executor, "_carry_out", lambda running, last: running)
    mode = SimpleNamespace(is_extend=lambda: True)
    prefill = SimpleNamespace(forward_mode=mode, extend_num_tokens=10)
    executor._alone = False
    clock = iter([1.0, 1.5, 1.7])
    monkeypatch.setattr("pascal_sglang.engine.plan_executor.own_word", lambda *_: next(clock))
    for last in (None, prefill, None)[: passes + 1]:
        executor.govern(SimpleNamespace(reqs=[]), last)
    took = 0.5 if device == "cpu" else 0.2
    assert executor.paused_requests.costs.prefill_token_s == pytest.approx(took / 10)


def test_idle_passes_do_not_say_how_long_a_step_takes(executor, monkeypatch):
    """An idle engine may spin: its status must stay as it is, or it would be told in every pass."""
    executor._alone = False
    monkeypatch.setattr(executor, "_carry_out", lambda running, last: running)
    clock = iter([1.0, 1.02, 1.0201, 1.0202, 1.04])
    monkeypatch.setattr("pascal_sglang.engine.plan_executor.own_word", lambda *_: next(clock))
    decode = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False))
    seen, passed = [], []
    executor.migrations = SimpleNamespace(passed=passed.append)
    for last in (None, decode, None, None, decode):
        executor.govern(SimpleNamespace(reqs=[]), last)
        seen.append(executor.request_states.pass_info.pass_s)
    assert seen[1] > 0
    assert seen[1] == seen[2] == seen[3] < seen[4]
    assert passed == [None, pytest.approx(0.02), None, None, pytest.approx(0.0198)]


@pytest.mark.parametrize(("rows", "entries"), [(0, 10), (1, 0)])
def test_a_resume_the_pool_refuses_leaves_the_request_paused(executor, rows, entries):
    paused_requests, pool = executor.paused_requests, scheduler(rows, entries)
    paused_requests.scheduler = paused_requests.pool.scheduler = pool
    request, copy = paused(), HostCopy(tokens=10, shared=0, prefix=None, own=object())
    paused_requests._enter(request, PauseStatus.HOST, copy=copy)
    assert paused_requests.resume(request) is False
    assert paused_requests.in_status(*PauseStatus) == [request]
    assert paused_requests.copy_of(request) is copy
    assert pool.req_to_token_pool.given == []
    assert pool.token_to_kv_pool_allocator.entries == entries


def test_what_a_pool_has_by_row_does_not_stay_without_one(executor, monkeypatch):
    paused_requests, request = executor.paused_requests, paused()
    request.finished, request.reset_for_retract = lambda: False, lambda: None
    request.kv = SimpleNamespace(cache_protected_len=0, holds_kv=True, kv_committed_len=10)
    monkeypatch.setattr(paused_requests.pool, "locations", lambda _: torch.arange(10))
    monkeypatch.setattr(paused_requests.pool, "release", lambda _: None)
    paused_requests.copies.by_row = True
    paused_requests._enter(request, PauseStatus.LEAVING, tier=KVTier.RESIDENT)
    assert list(paused_requests.finish_pauses()) == [(request, KVTier.RECOMPUTE)]


def test_a_copy_that_fails_turns_into_recompute(executor):
    paused_requests, request, released = executor.paused_requests, paused(), []
    request.reset_for_retract = lambda: released.append("reset")
    paused_requests._enter(request, PauseStatus.LEAVING)
    assert paused_requests._begin_copy(request, torch.arange(10), None), (
        "other ranks may have begun it"
    )
    assert not paused_requests.transfers.finish(paused_requests._table[request].transfer)
    assert paused_requests._off_device(request, 10, released.append) is KVTier.RECOMPUTE
    assert released == [request, "reset"]
    assert paused_requests.status_of(request) is None
    assert paused_requests.host_tokens == 0
    assert paused_requests.copies.room == 100
    assert paused_requests.counts["copy_failed"] == 1


def test_kv_that_no_prefill_would_make_again_stays_where_host_memory_has_no_room(executor):
    """Until SGLang would have to end a request for want of memory."""
    paused_requests, request, released = executor.paused_requests, paused(), []
    request.reset_for_retract = lambda: released.append("reset")
    request.lock, request.pascal_state.recomputes = None, False
    request.kv = SimpleNamespace(
        cache_protected_len=0,
        kv_committed_len=101,
        mark_kv_released=lambda: released.append("kv"),
    )
    paused_requests._enter(request, PauseStatus.RESIDENT, locations=torch.arange(0))
    assert not paused_requests.leaves_device(request)
    assert executor.capacity.reclaimable(SimpleNamespace(handle=request)) == 0
    paused_requests.copies.room = -1
    assert paused_requests.spill(request) is KVTier.RESIDENT
    assert paused_requests.in_status(PauseStatus.RESIDENT) == [request]
    assert released == []
    assert paused_requests.spill(request, at_any_price=True) is KVTier.RECOMPUTE
    assert paused_requests.status_of(request) is None
    assert released == ["kv", "reset"]


@pytest.mark.parametrize("recomputes", [True, False])
def test_who_stays_on_the_device_gives_nothing_back(executor, recomputes):
    """No tokens, no recurrent states, no entries of sliding windows."""
    paused_requests, request = executor.paused_requests, paused()
    request.pascal_state.recomputes = recomputes
    request.kv = SimpleNamespace(kv_committed_len=101, kv_allocated_len=101)
    one = SimpleNamespace(held=lambda req: 1)
    paused_requests.pool.states = paused_requests.pool.windows = one
    paused_requests.copies.room = 100
    paused_requests._enter(request, PauseStatus.LEAVING)
    assert paused_requests.releasing_tokens == (101 if recomputes else 0)
    assert paused_requests.releasing_states == paused_requests.releasing_windows == recomputes


# As SGLang's sampling parameters have them by default.
PENALTIES = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}


def request(**changes):
    fields = {
        "session": None,
        "session_id": None,
        "multimodal_inputs": None,
        "input_embeds": None,
        "lora_id": None,
        "return_hidden_states": False,
        "grammar": None,
    }
    names = ("watermark", "beam_width", *PENALTIES)
    params = SimpleNamespace(**{name: changes.pop(name, PENALTIES.get(name)) for name in names})
    return SimpleNamespace(sampling_params=params, **{**fields, **changes})


def test_a_plain_request_gets_everything():
    assert support.of_request(request()) == support.EVERYTHING


@pytest.mark.parametrize(
    ("change", "reason", "recomputes"),
    [
        ({}, None, True),
        ({"beam_width": 2}, "beam search", True),
        ({"session": SimpleNamespace(streaming=True)}, "a streaming session", True),
        ({"session": SimpleNamespace(streaming=False)}, None, True),
        ({"multimodal_inputs": object()}, "multimodal inputs", True),
        ({"lora_id": "l"}, None, True),
        ({"return_hidden_states": True}, None, False),
        ({"input_embeds": [[0.5]]}, None, False),
    ],
)
def test_which_requests_are_paused_and_recomputed(change, reason, recomputes):
    found = support.of_request(request(**change))
    assert (found.level < Level.RECOMPUTE) == (reason is not None)
    assert reason is None or found.lowered_by[0] == reason
    assert (support.first(support.NOT_RECOMPUTED, request(**change)) is None) == recomputes


@pytest.mark.parametrize(
    ("change", "reason"), [({"session_id": "s"}, "session"), ({"watermark": 1}, "water")]
)
def test_what_is_paused_and_does_not_move_says_why(change, reason):
    found = support.of_request(request(**change))
    assert found.level is support.Level.PAUSE
    assert reason in found.reason


@pytest.mark.parametrize("level", [level for level in Level if level > Level.OBSERVE])
def test_a_request_gets_the_lower_level_of_its_own_and_its_servers(level):
    server = support.Support(level, ("--some-flag",))
    config = PascalConfig()
    made = PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs(), server)
    told = []
    made.decision_log.metrics = SimpleNamespace(unpausable=told.append)
    made.scheduler.enable_priority_scheduling = False
    for change in ({}, {"session_id": "s"}, {"multimodal_inputs": object()}):
        req = arriving(**change)
        state = made.request_states.arrived(req)
        own = Level.ORDER if "multimodal_inputs" in change else Level.MOVE
        assert state.pausable == (min(level, own) >= Level.RECOMPUTE)
        assert state.keeps_kv == (min(level, own) >= Level.PAUSE)
    made.request_states.arrived(
        arriving(rid=f"{HEALTH_CHECK_RID_PREFIX}_1", multimodal_inputs=object())
    )
    expected = ["--some-flag"] * 2 if level < Level.RECOMPUTE else []
    assert told == [*expected, "multimodal inputs"]
    assert made.request_states.unpausable == Counter(told)


DROPS_KV = "a server that drops KV"


@pytest.mark.parametrize(
    ("changes", "server", "drafted", "level", "because"),
    [
        ({}, Level.MOVE, True, Level.MOVE, None),
        ({"presence_penalty": 1.5}, Level.MOVE, False, Level.MOVE, None),
        (
            {"presence_penalty": 1.5, "session_id": "s"},
            Level.MOVE,
            True,
            Level.ORDER,
            "penalties under speculative decoding",
        ),
        ({"session_id": "s"}, Level.MOVE, True, Level.PAUSE, "a session"),
        ({"session_id": "s"}, Level.RECOMPUTE, False, Level.RECOMPUTE, DROPS_KV),
        ({"input_embeds": [[0.5]]}, Level.RECOMPUTE, False, Level.ORDER, "input embeddings"),
    ],
)
def test_pauses_moves_and_metrics_give_the_reason_that_was_decided_on(
    changes, server, drafted, level, because
):
    config, told = PascalConfig(), []
    leaves = support.EVERYTHING.lowered(server, DROPS_KV)
    made = PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs(), leaves)
    made.decision_log.metrics = SimpleNamespace(unpausable=told.append)
    made.scheduler.enable_priority_scheduling = False
    made.request_states._drafts = drafted
    req = arriving(**changes)
    state = made.request_states.arrived(req)
    assert (support_of(req).level, support_of(req).because) == (level, because)
    assert state.pausable == (level >= Level.RECOMPUTE)
    assert told == ([] if state.pausable else [because])
    if because is not None:
        assert why_not_migratable(req) == because


def arriving(**changes):
    made = Paused(**vars(request(**changes)))
    made.rid, made.stream, made.priority = changes.get("rid", "r"), True, None
    made.sampling_params.custom_params, made.sampling_params.max_new_tokens = None, 9
    return made


def test_at_the_level_order_sglang_retracts_and_nothing_is_counted():
    config, order = PascalConfig(), support.Support(Level.ORDER, ("--some-flag",))
    made = PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs(), order)
    batch = Running(reqs=[running(pausable=False), running(pausable=False)])
    assert not made.relieve(batch)
    assert len(batch.reqs) == 2
    made.scheduler.get_num_allocatable_reqs = lambda *_, **__: 7
    made.scheduler.max_running_requests = 64
    there = made.capacity.available(batch)
    assert there.slots == 7
    assert there.free_tokens > 1 << 40, "SGLang says what fits"
    assert made.capacity.required(paused().pascal_state) == 0


def test_at_the_level_recompute_a_pause_drops_the_kv():
    config, recompute = PascalConfig(), support.Support(Level.RECOMPUTE, ("--some-flag",))
    made = PlanExecutor(scheduler(), config, config.record, FailingCopies(), Costs(), recompute)
    leaves, stays = running(pausable=True), running(pausable=True)
    leaves.pascal_state.keeps_kv = False
    batch = Running(reqs=[leaves, stays])
    states = [leaves.pascal_state, stays.pascal_state]
    made._take_out(states, batch, "displaced", lambda _: KVTier.RESIDENT)
    table = made.paused_requests._table
    assert [table[req].tier for req in (leaves, stays)] == [KVTier.RECOMPUTE, KVTier.RESIDENT]


def test_what_may_still_come_is_known_by_phase():
    """Thinking ends with its budget (and the marker), all ends with `max_new_tokens`."""
    params = SimpleNamespace(max_new_tokens=100, custom_params={"thinking_budget": 20})
    req = SimpleNamespace(sampling_params=params, output_ids=[0] * 15)
    member = RequestState(0, Pacer(0.1), phase_tokens=15)
    assert remaining_of(req, member) == 6
    member.phase = Phase.ANSWERING
    assert remaining_of(req, member) == 85
    params.max_new_tokens = None
    assert remaining_of(req, member) > 1_000_000


@pytest.mark.parametrize(
    ("status", "tokens"), [(RequestStatus.RESIDENT, 7), (RequestStatus.WAITING, 9)]
)
def test_what_a_start_takes_is_known_by_place(executor, status, tokens):
    """A dropped request is prefilled with its last token, whose KV it never had."""
    params = SimpleNamespace(max_new_tokens=20, custom_params=None)
    req = paused()
    req.sampling_params = params
    req.origin_input_ids, req.output_ids = [1] * 5, [2] * 4
    req.kv.kv_committed_len = 7
    executor.request_states._update_resume_cost(req, status)
    assert (req.pascal_state.kv_tokens, req.pascal_state.remaining) == (tokens, 16)


class Running(SimpleNamespace):
    """A batch whose next step does not fit."""

    def check_decode_mem(self):
        return False

    def is_empty(self):
        return not self.reqs

    def filter_batch(self, reqs_to_exclude):
        self.reqs = [r for r in self.reqs if r not in reqs_to_exclude]


def running(*, pausable):
    request = paused()
    member = request.pascal_state
    member.handle, member.status, member.pausable = request, RequestStatus.RUNNING, pausable
    request.kv.kv_committed_len = request.kv.kv_allocated_len = 10
    request.to_finish = None
    return request


def test_who_cannot_be_paused_waits_for_memory_that_is_on_its_way_back(executor):
    """SGLang would end the last request of a batch whose step does not fit."""
    stays, leaves = running(pausable=False), running(pausable=True)
    batch = Running(reqs=[stays, leaves])
    executor.scheduler.result_queue = [(Running(reqs=[stays, leaves]), None)]
    assert executor.relieve(batch)
    assert batch.reqs == [stays]
    assert executor.paused_requests.in_status(*PauseStatus) == [leaves]
    executor.paused_requests._remove(leaves)
    assert not executor.relieve(batch), "nothing comes back: it fits nowhere"


@pytest.mark.parametrize(
    ("phase", "tokens", "reader", "name"),
    [
        (Phase.REASONING, 100, Reader.HUMAN, "thinking"),
        (Phase.REASONING, 6000, Reader.HUMAN, "demoted"),
        (Phase.ANSWERING, 100, Reader.PROGRAM, "program_answer"),
        (Phase.ANSWERING, 0, Reader.HUMAN, "urgent_answer"),
    ],
)
def test_decisions_are_counted_by_the_class_that_a_user_knows(phase, tokens, reader, name):
    state = RequestState(
        0, Pacer(0.1), phase=phase, phase_tokens=tokens, total_tokens=tokens, reader=reader
    )
    decision_log = DecisionLog(POLICIES["pascal"], Tuning(), log=False)
    assert decision_log.class_of(state, PassInfo(1, 1.0, 0.01)) == name


def test_other_numbers_do_not_end_the_decision_file_or_traces():
    decision_log = DecisionLog(POLICIES["pascal"], Tuning(), log=False)
    decision_log.file, decision_log.traces = file, _ = SimpleNamespace(), True
    decision_log.retune(POLICIES["pascal"], Tuning(quantum=7), log=False)
    assert (decision_log.file, decision_log.traces) == (file, True)


def test_a_resume_matches_its_prefix_once_and_again_only_after_a_change(executor, monkeypatch):
    tree = RadixCache.create_simulated(mock_allocator=Allocator())
    executor.scheduler.tree_cache, matches = tree, []
    tokens = array("q", [1, 2, 3, 4])
    tree.insert(InsertParams(key=RadixKey(token_ids=tokens), value=torch.arange(4)))
    match_prefix = tree.match_prefix
    monkeypatch.setattr(tree, "match_prefix", lambda p: (matches.append(p), match_prefix(p))[1])
    paused_requests, request = executor.paused_requests, paused()
    request.origin_input_ids, request.output_ids = tokens, array("q", [5])
    paused_requests._enter(request, PauseStatus.HOST, copy=HostCopy(4, 3, None, None))
    assert paused_requests.needs(request) == 4, "the prefix is taken from what can be evicted"
    assert paused_requests.can_resume(request, 0)
    assert paused_requests.resume(request) is False
    assert len(matches) == 1
    # The resume locked the prefix and let it go again.
    assert paused_requests.needs(request) == 4
    assert len(matches) == 2
    other = executor.pool.lock(executor.pool.cached_prefix(request, 3).node)
    assert paused_requests.needs(request) == 1, "another request holds the prefix"
    executor.pool.unlock(other)
    tree.reset()
    executor.pool.changed()
    assert paused_requests.needs(request) == 4
    assert len(matches) == 5


@pytest.mark.parametrize("inputs", [None, object()])
def test_inputs_that_a_request_gets_later_count_when_it_arrives(executor, inputs):
    executor.scheduler.enable_priority_scheduling = False
    executor.decision_log.metrics = None
    state = executor.request_states.arrived(arriving(), SimpleNamespace(mm_inputs=inputs))
    assert state.pausable == (inputs is None)
    assert executor.request_states.unpausable == Counter([MULTIMODAL.name] if inputs else [])
