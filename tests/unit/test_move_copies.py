"""KV on its way between instances while both decode: nobody is told of bytes that are not there,
and no window is written while it is read."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pascal_sglang.cluster import messages, transport
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.orders import Order
from pascal_sglang.cluster.receive_slots import ASK_S, DEAD_S
from pascal_sglang.engine.kv.host_copies import Copies, HostKV
from pascal_sglang.engine.kv.serializer import KvBytes
from pascal_sglang.engine.migration.incoming import Arrivals
from pascal_sglang.engine.migration.outgoing import Departures
from pascal_sglang.engine.migration.prefill_gate import Clearance
from pascal_sglang.engine.migration.receive_buffer import WINDOWS, Landing, landing_bytes
from tests.unit.test_copies import Broken, pool_of

TOKENS = 40


class LateCopies(Copies):
    """As on CUDA: a copy is there when it is waited for, and not before."""

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.deferred, self.under_way, self.held = True, [], []

    def read(self, locations, kv):
        return self.later(kv, lambda: Copies.read(self, locations, kv))

    def to_device(self, kv, locations):
        self.later(kv, lambda: Copies.to_device(self, kv, locations))

    def hold_steps(self, kv):
        self.held.append(kv)

    def later(self, kv, copy):
        kv.done = SimpleNamespace(synchronize=lambda: self.finish(kv, copy))
        self.under_way.append(kv)
        return kv

    def finish(self, kv, copy):
        self.under_way.remove(kv)
        copy()


class Request:
    rid, origin_input_ids, output_ids = "r", [1] * TOKENS, []
    to_finish, over = None, False

    def __init__(self):
        self.kv = SimpleNamespace(kv_committed_len=TOKENS)

    def finished(self):
        return self.over


class Ladder(SimpleNamespace):
    def leave(self, reqs, running, rung):
        for req in reqs:
            running.reqs.remove(req)
            self.resident[req] = self.pool.locations(req)


class Instance:
    """One side: a pool of KV, a landing, and a scheduler that does nothing."""

    def __init__(self, windows=None):
        pool, self.said = pool_of(MHATokenToKVPool), []
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            device="cpu",
            running_batch=SimpleNamespace(reqs=[Request()]),
            enable_overlap=False,
            tp_cpu_group=SimpleNamespace(size=lambda: 1),
            max_req_len=500,
            _engine_paused=False,
        )
        self.copies = LateCopies(self.scheduler)
        self.kv = KvBytes(self.copies, self.copies.buffers, "model", lambda: "default")
        self.transport = transport.make("shm", landing_bytes(self.kv), 0)
        self.pool = SimpleNamespace(
            in_pages=lambda tokens: tokens,
            take=lambda tokens: torch.arange(20, 20 + tokens),
            locations=lambda req: torch.arange(1, 1 + req.kv.kv_committed_len),
            allocator=SimpleNamespace(free=lambda locations: None),
            free_tokens=90,
        )
        self.ladder = Ladder(pool=self.pool, resident={}, host={}, moving=set())
        self.ladder.leaving, self.ladder.arriving = {}, {}
        self.ladder.let_go = self.ladder.resident.pop
        self.ladder.adopt = self.ladder.resident.__setitem__
        self.landing = Landing(self.pool, self.kv, self.transport.landing)
        self.governor = SimpleNamespace(
            ladder=self.ladder,
            moment=SimpleNamespace(now=1.0, pass_no=1),
            planner=SimpleNamespace(left=lambda member: None),
            settle=lambda: None,
            stopped=lambda req, place: self.said.append(("stopped", place)),
            view=SimpleNamespace(promised_tokens=lambda: 0),
            members=SimpleNamespace(arrived=lambda req: None),
        )
        voice = SimpleNamespace(say=lambda to, said: self.said.extend(said))
        sides = (self.scheduler, self.governor, Terms())
        way = (self.transport, self.kv, self.landing.window, voice, Clearance())
        self.departures = Departures(*sides, *way)
        landings = [self.transport.address]
        self.arrivals = Arrivals(*sides, self.landing, landings, voice, Clearance())

    def take(self, kind):
        """What it has said of a kind."""
        found = [message for message in self.said if isinstance(message, kind)]
        self.said = [message for message in self.said if not isinstance(message, kind)]
        return found

    def step(self):
        self.departures.step(self.scheduler.running_batch, 1.0)
        self.arrivals.step(1.0)

    def kv_at(self, locations):
        return [buffer[locations].clone() for buffer in self.copies.buffers]


@pytest.fixture
def sides(monkeypatch):
    """A source whose request has been granted a move, and the target of it."""
    there = "pascal_sglang.engine.migration"
    parallel = SimpleNamespace(tp_size=1, dp_rank=0, tp_rank=0)
    for module in ("departures", "arrivals", "kv_bytes"):
        monkeypatch.setattr(f"{there}.{module}.get_parallel", lambda: parallel)
    monkeypatch.setattr(f"{there}.outgoing.why_not_movable", lambda req: None)
    monkeypatch.setattr(f"{there}.outgoing.member_of", lambda req: None)
    monkeypatch.setattr(f"{there}.outgoing.remaining_of", lambda req, member: 20)
    timeline = SimpleNamespace(stopped=lambda why, now: None)
    monkeypatch.setattr(f"{there}.outgoing.timeline_of", lambda req: timeline)
    state = {"blocked_since": 1.0}
    monkeypatch.setattr(f"{there}.outgoing.export_state", lambda req, since: state)
    monkeypatch.setattr(f"{there}.incoming.problem_with", lambda *_: None)
    monkeypatch.setattr(f"{there}.incoming.import_state", lambda *_: Request())
    monkeypatch.setattr(f"{there}.incoming.restore_member", lambda *_: None)
    source, target = Instance(), Instance()
    source.departures.ordered(Order("m", "r", 1), 1.0)
    (ask,) = source.take(messages.Ask)
    target.arrivals.asked(0, ask, 1.0)
    (granted,) = target.take(messages.Granted)
    source.departures.hear(1, granted, 1.0)
    source.step()
    return source, target


def request_of(instance):
    return instance.scheduler.running_batch.reqs[0]


def test_both_words_of_a_piece_come_when_its_copies_are_complete(sides):
    source, target = sides
    expected = source.kv_at(torch.arange(1, 1 + TOKENS))
    assert source.said == [], "the piece is on its way"
    source.step()
    (chunk,) = source.take(messages.Chunk)
    assert (chunk.begin, chunk.end) == (0, TOKENS)
    target.arrivals.hear(0, chunk, 1.0)
    target.arrivals.hear(0, chunk, 1.0)
    assert target.said == [], "the window is read; another piece would overwrite it"
    target.step()
    assert target.take(messages.Got) == [messages.Got("m", TOKENS)]
    target.landing.memory[:] = bytes(len(target.landing.memory))
    arrived = target.kv_at(torch.arange(20, 20 + TOKENS))
    assert all(map(torch.equal, arrived, expected))


def test_the_last_piece_is_said_at_once_and_its_window_kept_until_it_is_read(sides):
    source, target = sides
    source.step()
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    target.step()
    request = request_of(source)
    request.kv.kv_committed_len += 3
    source.departures.hear(1, *target.take(messages.Got), 1.0)
    source.step()
    (handover,) = source.take(messages.Handover)
    assert source.copies.under_way == []
    target.arrivals.hear(0, handover, 1.0)
    assert target.take(messages.Mine)
    assert target.copies.under_way == target.copies.held != [], "steps wait for it by themselves"
    assert target.landing.windows.free == WINDOWS - 1
    assert not target.arrivals.is_idle
    target.step()
    assert target.landing.windows.free == WINDOWS
    assert target.arrivals.is_idle
    (locations,) = target.ladder.resident.values()
    expected = source.kv_at(source.ladder.resident[request])
    assert all(map(torch.equal, target.kv_at(locations), expected))


def end(source, target):
    request_of(source).over = True
    source.step()


def abort(source, target):
    source.departures.aborted(lambda rid: rid == "r")


def refuse(source, target):
    target.arrivals.aborted("r", lambda rid: rid == "r", 1.0)
    source.departures.hear(1, *target.take(messages.Refused), 1.0)


def drop(source, target):
    source.scheduler.running_batch.reqs.clear()  # To be prefilled again: it has lost its KV.
    source.step()


@pytest.mark.parametrize("how", [end, abort, refuse, drop])
def test_a_move_that_ends_meanwhile_leaves_nothing_on_its_way(how, sides):
    source, target = sides
    assert source.copies.under_way
    how(source, target)
    assert source.copies.under_way == []
    assert source.take(messages.Chunk) == []
    assert source.take(messages.Cancelled) == [messages.Cancelled("m")]
    assert source.departures.under_way == {}


def test_a_target_that_dies_meanwhile_is_still_waited_for(sides):
    source, _ = sides
    source.departures.died(1)
    assert source.copies.under_way == []
    assert source.departures.counts == {"kept:target died": 1}


def test_a_source_whose_device_fails_keeps_the_request(sides, caplog):
    source, _ = sides
    source.copies.buffers[1] = Broken()
    source.step()
    assert source.take(messages.Chunk) == []
    assert source.take(messages.Cancelled) == [messages.Cancelled("m")]
    assert source.departures.counts == {"kept:transport": 1}
    assert "r stays: reading KV failed" in caplog.text


def test_a_target_whose_device_fails_refuses(sides, monkeypatch):
    source, target = sides
    source.step()
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    target.copies.buffers[1] = Broken()
    target.step()
    assert target.take(messages.Got) == []
    assert target.take(messages.Refused) == [messages.Refused("m", "transport")]
    assert target.landing.windows.free == WINDOWS - 1


def test_whatever_fails_on_a_rank_is_told_to_the_others_who_wait_for_its_word(sides):
    source, target = sides
    source.step()
    target.kv.copy_in = source.transport.room = None
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    assert target.take(messages.Refused) == [messages.Refused("m", "transport")]
    out = source.departures.under_way["m"]
    out.write(0, 5, None, source.transport, source.kv, 0)
    assert "reading KV failed" in out.written(source.transport, source.kv)


def cancelled(target):
    target.arrivals.hear(0, messages.Cancelled("m"), 1.0)


def source_died(target):
    target.arrivals.died(0)


@pytest.mark.parametrize("way", [cancelled, source_died])
@pytest.mark.parametrize("reads_first", [True, False])
def test_a_window_given_up_is_kept_until_it_is_read_and_its_source_is_through(
    way, reads_first, sides
):
    source, target = sides
    source.step()
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    assert target.copies.held == [], "nobody reads this KV before it is complete"
    target.arrivals.aborted("r", lambda rid: rid == "r", 1.0)
    assert target.take(messages.Refused)
    assert target.copies.under_way == target.copies.held != [], "its KV entries are free already"
    assert target.landing.windows.free == WINDOWS - 1
    steps = [target.step, lambda: way(target)]
    for step in steps if reads_first else steps[::-1]:
        assert target.landing.windows.free == WINDOWS - 1
        step()
    if way is source_died:
        assert target.landing.windows.free == WINDOWS - 1
        target.arrivals.step(1.0 + DEAD_S)
    assert (target.landing.windows.free, target.landing.windows.in_doubt) == (WINDOWS, 0)


def test_a_source_that_has_forgotten_the_move_says_that_it_does_not_write(sides):
    source, target = sides
    abort(source, target)
    assert source.take(messages.Cancelled), "it is lost"
    target.arrivals.aborted("r", lambda rid: rid == "r", 1.0)
    target.arrivals.step(1.0 + ASK_S)
    source.departures.hear(1, *target.take(messages.WriteQuery), 2.0)
    assert target.landing.windows.free == WINDOWS - 1
    target.arrivals.hear(0, *source.take(messages.Cancelled), 2.0)
    assert target.landing.windows.free == WINDOWS


def test_a_paused_request_is_read_from_both_halves_of_its_copy(sides):
    source, _ = sides
    whole = source.kv_at(torch.arange(TOKENS))
    halves = [HostKV([p[:15] for p in whole]), HostKV([p[15:] for p in whole])]
    for begin, stop in ((0, 40), (3, 11), (10, 30), (15, 40)):
        memory = memoryview(bytearray((stop - begin) * source.kv.per_token))
        source.kv.copy_host(halves, begin, stop, memory)
        got = list(source.kv._blocks(memory, stop - begin))
        assert all(map(torch.equal, got, [part[begin:stop] for part in whole]))


def test_a_piece_of_who_leaves_the_batch_meanwhile_is_good(sides):
    source, _ = sides
    request = source.scheduler.running_batch.reqs.pop()
    source.ladder.leaving[request] = None
    source.step()
    assert [(c.begin, c.end) for c in source.take(messages.Chunk)] == [(0, TOKENS)]


def test_a_request_that_moves_on_is_told_of_once(sides):
    source, target = sides
    request, left = request_of(source), []
    source.departures.left = left.append
    source.step()
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    target.step()
    source.departures.hear(1, *target.take(messages.Got), 1.0)
    source.step()
    target.arrivals.hear(0, *source.take(messages.Handover), 1.0)
    target.step()
    assert left == []
    source.departures.hear(1, *target.take(messages.Mine), 1.0)
    assert left == [request]
