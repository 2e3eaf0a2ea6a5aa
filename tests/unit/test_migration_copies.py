"""KV on its way between instances while both decode: nobody is told of bytes that are not there,
and no slot is written while it is read."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang import clock
from pascal_sglang.cluster import messages, transport
from pascal_sglang.cluster.messages import MigrateCommand
from pascal_sglang.cluster.migration_pace import MigrationPace
from pascal_sglang.cluster.migration_source import WINDOWS, Terms
from pascal_sglang.cluster.receive_slots import ASK_S, DEAD_S
from pascal_sglang.engine.kv.host_copies import HostCopies, HostCopy
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.migration import outgoing
from pascal_sglang.engine.migration.incoming import IncomingMigrations
from pascal_sglang.engine.migration.outgoing import OutgoingMigrations
from pascal_sglang.engine.migration.prefill_gate import PrefillGate
from pascal_sglang.engine.migration.receive_buffer import (
    LEAST_TOKENS,
    SHARE,
    SLOTS,
    WINDOW_BYTES,
    ReceiveBuffer,
    receive_buffer_bytes,
    window_bytes,
    window_tokens,
)
from pascal_sglang.policy.kv_tier import Costs
from tests.unit.test_host_copies import Broken, pool_of

TOKENS = 40
STATE = SimpleNamespace(pausable=True)


class LateCopies(HostCopies):
    """As on CUDA: a copy is there when it is waited for, or found to be complete, and not before.
    lands: whether it is, when asked."""

    lands = True

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.deferred, self.under_way, self.held = True, [], []

    def read(self, locations, kv):
        return self.later(kv, lambda: HostCopies.read(self, locations, kv))

    def to_device(self, kv, locations):
        self.later(kv, lambda: HostCopies.to_device(self, kv, locations))

    def hold_steps(self, kv):
        self.held.append(kv)

    def later(self, kv, copy):
        kv.done = SimpleNamespace(
            synchronize=lambda: self.finish(kv, copy),
            query=lambda: self.lands and self.finish(kv, copy),
        )
        self.under_way.append(kv)
        return kv

    def finish(self, kv, copy):
        self.under_way.remove(kv)
        copy()
        return True


class Request:
    rid, origin_input_ids, output_ids = "r", [1] * TOKENS, []
    to_finish, over = None, False
    time_stats = SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False))

    def __init__(self):
        self.kv = SimpleNamespace(kv_committed_len=TOKENS)

    def finished(self):
        return self.over

    def reset_for_retract(self):
        self.kv.kv_committed_len = 0


class Resident(PausedRequests):
    """A request that leaves the batch is resident at once."""

    def leave(self, reqs, running, tier):
        for req in reqs:
            running.reqs.remove(req)
            self.adopt(req, self.pool.locations(req))

    def adopt(self, req, locations, before=0, state=None, drafted=None):
        self._enter(req, PauseStatus.RESIDENT, locations=locations)


class Instance:
    """One side: a pool of KV, a receive buffer, and a scheduler that does nothing."""

    def __init__(self):
        pool, self.said = pool_of(MHATokenToKVPool), []
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            req_to_token_pool=None,
            tree_cache=None,
            device="cpu",
            running_batch=SimpleNamespace(reqs=[Request()]),
            waiting_queue=[],
            enable_overlap=False,
            attn_tp_cpu_group=SimpleNamespace(size=lambda: 1),
            spec_algorithm=SpeculativeAlgorithm.NONE,
            max_req_len=500,
            _engine_paused=False,
        )
        self.copies = LateCopies(self.scheduler)
        self.kv = KVSerializer(self.copies, "model", lambda: "default")
        self.transport = transport.make("shm", receive_buffer_bytes(self.kv), 0)
        self.pool = SimpleNamespace(
            in_pages=lambda tokens: tokens,
            take=lambda tokens, before: torch.arange(20, 20 + tokens),
            give=lambda locations, before: None,
            give_windows=lambda locations: None,
            windows=None,
            states=None,
            locations=lambda req: torch.arange(1, 1 + req.kv.kv_committed_len),
            release_rowless=lambda req, locations: None,
            free_tokens=90,
        )
        self.paused_requests = Resident(self.scheduler, self.copies, Costs())
        self.paused_requests.pool = self.pool
        self.transfers = self.paused_requests.transfers
        self.receive_buffer = ReceiveBuffer(
            self.pool, self.kv, self.transport.receive_buffer, self.transfers
        )
        self.states = SimpleNamespace(
            paused_requests=self.paused_requests,
            pass_info=SimpleNamespace(now=1.0, pass_no=1, pass_s=0.02),
            ended=lambda req: None,
            finish_pauses=lambda: None,
            stopped=lambda req, status: self.said.append(("stopped", status)),
            arrived=lambda req: None,
        )
        capacity = SimpleNamespace(promised_tokens=lambda: 0, free_windows=lambda: 90)
        control_sender = SimpleNamespace(send=lambda to, said: self.said.extend(said))
        shared = {
            "scheduler": self.scheduler,
            "states": self.states,
            "terms": Terms(),
            "control_sender": control_sender,
        }
        self.outgoing_migrations = OutgoingMigrations(
            transport=self.transport,
            kv=self.kv,
            pace=MigrationPace(self.receive_buffer.slot_tokens),
            prefill_gate=PrefillGate(),
            **shared,
        )
        self.incoming_migrations = IncomingMigrations(
            capacity=capacity,
            receive_buffer=self.receive_buffer,
            receive_buffers=[self.transport.address],
            prefill_gate=PrefillGate(),
            **shared,
        )

    def take(self, kind):
        """What it has said of a kind."""
        found = [message for message in self.said if isinstance(message, kind)]
        self.said = [message for message in self.said if not isinstance(message, kind)]
        return found

    def step(self):
        self.transfers.heard(*self.transfers.progress())
        self.outgoing_migrations.step(self.scheduler.running_batch, 1.0)
        self.incoming_migrations.step(1.0)

    def kv_at(self, locations):
        return [buffer[locations].clone() for buffer in self.copies.buffers]


@pytest.fixture
def pair(monkeypatch):
    """Two instances, the first with a request."""
    there = "pascal_sglang.engine"
    parallel = SimpleNamespace(attn_tp_size=1, dp_rank=0, attn_tp_rank=0)
    for module in ("engine.migration.outgoing", "engine.kv.serializer", "instances"):
        monkeypatch.setattr(f"pascal_sglang.{module}.get_parallel", lambda: parallel)
    monkeypatch.setattr(f"{there}.migration.outgoing.why_not_migratable", lambda req: None)
    monkeypatch.setattr(f"{there}.migration.outgoing.state_of", lambda req: STATE)
    monkeypatch.setattr(f"{there}.migration.outgoing.remaining_of", lambda req, member: 20)
    timeline = SimpleNamespace(stopped=lambda why, now: None, last_answer=1.0)
    monkeypatch.setattr(f"{there}.migration.outgoing.timeline_of", lambda req: timeline)
    here = SimpleNamespace(name=clock.name(), now=clock.now())
    snapshot = SimpleNamespace(
        blocked_since=1.0, grammar=False, drafted={}, output_ids=[1], clock=here
    )
    monkeypatch.setattr(f"{there}.migration.outgoing.export_state", lambda *_: b"")
    monkeypatch.setattr(f"{there}.migration.incoming.read_snapshot", lambda *_: snapshot)
    monkeypatch.setattr(f"{there}.migration.incoming.import_state", lambda *_: Request())
    monkeypatch.setattr(f"{there}.migration.incoming.restore_state", lambda *_: None)
    return Instance(), Instance()


@pytest.fixture
def sides(pair):
    """A source whose request has been granted a move, and the target of it."""
    source, target = pair
    source.outgoing_migrations.ordered(MigrateCommand("m", "r", 1), 1.0)
    (ask,) = source.take(messages.ReserveRequest)
    target.incoming_migrations.asked(0, ask, 1.0)
    (granted,) = target.take(messages.ReserveGranted)
    source.outgoing_migrations.hear(1, granted, 1.0)
    source.step()
    return source, target


def request_of(instance):
    return instance.scheduler.running_batch.reqs[0]


def test_both_words_of_a_piece_come_when_its_copies_are_complete(sides):
    source, target = sides
    expected = source.kv_at(torch.arange(1, 1 + TOKENS))
    assert source.said == [], "the piece is on its way"
    source.step()
    (chunk,) = source.take(messages.KVChunk)
    assert (chunk.begin, chunk.end) == (0, TOKENS)
    target.incoming_migrations.hear(0, chunk, 1.0)
    target.incoming_migrations.hear(0, chunk, 1.0)
    said = target.take(messages.ChunkAck)
    assert said == [messages.ChunkAck("m", 0)], "it is read; another piece would overwrite it"
    assert target.copies.under_way, "nobody waits for it"
    target.copies.lands = False
    target.step()
    assert target.said == []
    target.copies.lands = True
    target.step()
    assert target.take(messages.ChunkAck) == [messages.ChunkAck("m", TOKENS)]
    target.receive_buffer.memory[:] = bytes(len(target.receive_buffer.memory))
    arrived = target.kv_at(torch.arange(20, 20 + TOKENS))
    assert all(map(torch.equal, arrived, expected))


def test_the_last_piece_is_said_at_once_and_its_slot_kept_until_it_is_read(sides):
    source, target = sides
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    target.step()
    request = request_of(source)
    request.kv.kv_committed_len += 3
    source.outgoing_migrations.hear(1, *target.take(messages.ChunkAck), 1.0)
    source.step()
    (handover,) = source.take(messages.Handover)
    assert source.copies.under_way == []
    target.incoming_migrations.hear(0, handover, 1.0)
    assert target.take(messages.CommitAck)
    assert target.copies.under_way == target.copies.held != [], "steps wait for it by themselves"
    assert target.receive_buffer.slots.free == SLOTS - 1
    assert not target.incoming_migrations.is_idle
    target.step()
    assert target.receive_buffer.slots.free == SLOTS
    assert target.incoming_migrations.is_idle
    (taken,) = target.paused_requests.in_status(PauseStatus.RESIDENT)
    locations = target.paused_requests.locations_of(taken)
    expected = source.kv_at(source.paused_requests.locations_of(request))
    assert all(map(torch.equal, target.kv_at(locations), expected))


def end(source, target):
    request_of(source).over = True
    source.step()


def abort(source, target):
    source.outgoing_migrations.aborted(lambda rid: rid == "r")


def refuse(source, target):
    target.incoming_migrations.aborted("r", lambda rid: rid == "r", 1.0)
    source.outgoing_migrations.hear(1, *target.take(messages.ReserveRefused), 1.0)


def drop(source, target):
    source.scheduler.running_batch.reqs.clear()  # To be prefilled again: it has lost its KV.
    source.step()


@pytest.mark.parametrize("how", [end, abort, refuse, drop])
def test_a_move_that_ends_meanwhile_leaves_nothing_on_its_way(how, sides):
    source, target = sides
    source.copies.lands = False
    assert source.copies.under_way
    how(source, target)
    assert source.copies.under_way == []
    assert source.take(messages.KVChunk) == []
    assert source.take(messages.MigrationCancelled) == [messages.MigrationCancelled("m")]
    assert source.outgoing_migrations.under_way == {}


def test_a_target_that_dies_meanwhile_is_still_waited_for(sides):
    source, _ = sides
    source.outgoing_migrations.died(1)
    assert source.copies.under_way == []
    assert source.outgoing_migrations.counts == {"kept:target died": 1}


def test_a_source_whose_device_fails_keeps_the_request(sides, caplog):
    source, _ = sides
    source.copies.buffers[1] = Broken()
    source.step()
    assert source.take(messages.KVChunk) == []
    assert source.take(messages.MigrationCancelled) == [messages.MigrationCancelled("m")]
    assert source.outgoing_migrations.counts == {"kept:transport": 1}
    assert "r stays: reading KV failed" in caplog.text


def test_a_target_whose_device_fails_refuses(sides, monkeypatch):
    source, target = sides
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    target.copies.buffers[1] = Broken()
    target.step()
    assert target.take(messages.ChunkAck) == []
    assert target.take(messages.ReserveRefused) == [messages.ReserveRefused("m", "transport")]
    assert target.receive_buffer.slots.free == SLOTS - 1


def test_whatever_fails_on_a_rank_is_told_to_the_others_who_wait_for_its_word(sides):
    source, target = sides
    source.step()
    target.kv.copy_in = source.transport.room = None
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    assert target.said == [], "the ranks say so in the next pass"
    target.step()
    assert target.take(messages.ReserveRefused) == [messages.ReserveRefused("m", "transport")]
    kv = source.outgoing_migrations.under_way["m"].kv
    kv.write(0, 5, 0, None)
    assert "reading KV failed" in kv.written()


def test_pieces_go_through_the_windows_of_a_slot_in_turn(sides, monkeypatch):
    """The second one is written while the first is read; a third waits for the first."""
    source, target = sides
    source.outgoing_migrations.under_way["m"].keep("a smaller piece is wanted")
    source.outgoing_migrations.give_up("again")
    source.said.clear()
    target.incoming_migrations.give_up("again")
    target.said.clear()
    for side in (source, target):
        side.receive_buffer.slot_tokens = 16
    source.outgoing_migrations.ordered(MigrateCommand("n", "r", 1), 1.0)
    target.incoming_migrations.asked(0, *source.take(messages.ReserveRequest), 1.0)
    source.outgoing_migrations.hear(1, *target.take(messages.ReserveGranted), 1.0)
    target.copies.lands, chunks = False, []
    for _ in range(4):
        source.step()
        for chunk in source.take(messages.KVChunk):
            chunks.append((chunk.begin, chunk.end))
            target.incoming_migrations.hear(0, chunk, 1.0)
    assert chunks == [(0, 16), (16, 32)], "both windows are taken"
    expected = source.kv_at(torch.arange(1, 33))
    target.copies.lands = True
    target.step()
    assert target.take(messages.ChunkAck) == [messages.ChunkAck("n", 32)]
    arrived = target.kv_at(torch.arange(20, 52))
    assert all(map(torch.equal, arrived, expected))


def cancelled(target):
    target.incoming_migrations.hear(0, messages.MigrationCancelled("m"), 1.0)


def source_died(target):
    target.incoming_migrations.died(0)


@pytest.mark.parametrize("way", [cancelled, source_died])
@pytest.mark.parametrize("reads_first", [True, False])
def test_a_slot_given_up_is_kept_until_it_is_read_and_its_source_is_through(
    way, reads_first, sides
):
    source, target = sides
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    assert target.copies.held == [], "nobody reads this KV before it is complete"
    target.incoming_migrations.aborted("r", lambda rid: rid == "r", 1.0)
    assert target.take(messages.ReserveRefused)
    assert target.copies.under_way == target.copies.held != [], "its KV entries are free already"
    assert target.receive_buffer.slots.free == SLOTS - 1
    steps = [target.step, lambda: way(target)]
    for step in steps if reads_first else steps[::-1]:
        assert target.receive_buffer.slots.free == SLOTS - 1
        step()
    if way is source_died:
        assert target.receive_buffer.slots.free == SLOTS - 1
        target.incoming_migrations.step(1.0 + DEAD_S)
    assert (target.receive_buffer.slots.free, target.receive_buffer.slots.in_doubt) == (
        SLOTS,
        0,
    )


def test_a_source_that_has_forgotten_the_move_says_that_it_does_not_write(sides):
    source, target = sides
    abort(source, target)
    assert source.take(messages.MigrationCancelled), "it is lost"
    target.incoming_migrations.aborted("r", lambda rid: rid == "r", 1.0)
    target.incoming_migrations.step(1.0 + ASK_S)
    source.outgoing_migrations.hear(1, *target.take(messages.WriteQuery), 2.0)
    assert target.receive_buffer.slots.free == SLOTS - 1
    target.incoming_migrations.hear(0, *source.take(messages.MigrationCancelled), 2.0)
    assert target.receive_buffer.slots.free == SLOTS


def test_a_paused_request_is_read_from_both_halves_of_its_copy(sides):
    source, _ = sides
    whole = source.kv_at(torch.arange(TOKENS))
    prefix, own = HostKV([p[:15] for p in whole]), HostKV([p[15:] for p in whole])
    copy = HostCopy(TOKENS, 15, prefix, own)
    for begin, stop in ((0, 40), (3, 11), (10, 30), (15, 40)):
        memory = memoryview(bytearray(source.kv.size(stop - begin, 0)))
        source.kv.copy_host(copy, begin, stop, 0, memory)
        (got,) = source.kv._blocks(memory, stop - begin, 0)
        assert all(map(torch.equal, got, [part[begin:stop] for part in whole]))


@pytest.mark.parametrize(("others", "moves"), [(0, 1), (1, 1), (1, 2)])
def test_kv_in_host_memory_goes_in_small_pieces_while_others_decode(
    others, moves, pair, monkeypatch
):
    """The scheduler's thread copies it; what all moves send in a pass is bounded."""
    source, target = pair
    monkeypatch.setattr(outgoing, "HOST_PIECE_BYTES", 16 * source.kv.per_token)
    requests = [request_of(source), Request()][:moves]
    source.scheduler.running_batch.reqs = [Request() for _ in range(others)]
    whole = source.kv_at(torch.arange(1, 1 + TOKENS))
    for number, request in enumerate(requests):
        request.rid = f"r{number}"
        copy = HostCopy(TOKENS, 0, None, HostKV(whole))
        source.paused_requests._enter(request, PauseStatus.HOST, copy=copy)
        source.outgoing_migrations.ordered(MigrateCommand(f"m{number}", request.rid, 1), 1.0)
        target.incoming_migrations.asked(0, *source.take(messages.ReserveRequest), 1.0)
        source.outgoing_migrations.hear(1, *target.take(messages.ReserveGranted), 1.0)
    source.step()
    source.step()
    sizes = [chunk.end - chunk.begin for chunk in source.take(messages.KVChunk)]
    assert sizes == [16 // moves if others else TOKENS] * moves


def test_a_piece_of_who_leaves_the_batch_meanwhile_is_good(sides):
    source, _ = sides
    request = source.scheduler.running_batch.reqs.pop()
    source.paused_requests._enter(request, PauseStatus.LEAVING)
    source.step()
    assert [(c.begin, c.end) for c in source.take(messages.KVChunk)] == [(0, TOKENS)]


def test_a_request_that_moves_on_is_told_of_once(sides):
    source, target = sides
    request, left = request_of(source), []
    source.outgoing_migrations.left = left.append
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    target.step()
    source.outgoing_migrations.hear(1, *target.take(messages.ChunkAck), 1.0)
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.Handover), 1.0)
    target.step()
    assert left == []
    source.outgoing_migrations.hear(1, *target.take(messages.CommitAck), 1.0)
    assert left == [request]


def test_windows_are_small_on_a_small_machine(pair):
    assert window_bytes(2 << 40, 8) == WINDOW_BYTES
    small = window_bytes(16 << 30, 4)
    assert 4 * SLOTS * WINDOWS * small == (16 << 30) * SHARE
    kv = SimpleNamespace(per_token=128 << 10)
    assert window_tokens(kv) == 512
    assert window_tokens(kv, small) == 128
    assert window_tokens(kv, small // 1000) == LEAST_TOKENS
    here, _ = pair
    most = 20 * here.kv.per_token
    buffer = ReceiveBuffer(here.pool, here.kv, memoryview(b""), here.transfers, most)
    assert buffer.slot_tokens == 20
    assert buffer.slot_bytes * SLOTS == receive_buffer_bytes(here.kv, most)
    assert receive_buffer_bytes(here.kv, most) == SLOTS * WINDOWS * here.kv.window_bytes(20)


def test_the_buffer_of_an_instance_that_has_died_is_given_back_after_what_goes_there(
    sides, monkeypatch
):
    source, target = sides
    source.outgoing_migrations.open_peer(1, [target.transport.address])
    closed = []
    monkeypatch.setattr(
        source.transport, "close_peer", lambda at: closed.append((at, *source.copies.under_way))
    )
    assert source.copies.under_way
    source.outgoing_migrations.died(2)
    assert closed == []
    source.outgoing_migrations.died(1)
    source.outgoing_migrations.died(1)
    assert closed == [(target.transport.address,)]


def handed_over(source, target):
    """Up to the word that hands the request over, whose KV is on the target."""
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    target.step()
    request_of(source).kv.kv_committed_len += 3
    source.outgoing_migrations.hear(1, *target.take(messages.ChunkAck), 1.0)
    source.step()
    return source.take(messages.Handover)


@pytest.mark.parametrize("where", ["arrived", "keep", "adopt", "stopped", "arrived_at"])
def test_an_error_while_a_request_is_taken_over_leaves_it_at_its_source(
    where, sides, monkeypatch, caplog
):
    """And every entry of the pool that was reserved for it is given back once."""
    source, target = sides
    (handover,) = handed_over(source, target)
    incoming, states = target.incoming_migrations, target.states
    given = []
    target.pool.give = lambda locations, before: given.extend(locations.tolist())
    target.pool.release_rowless = lambda req, locations: given.extend(locations.tolist())
    states.ended = lambda req: target.said.append(("ended", req))

    def fail(*_):
        raise RuntimeError("broken")

    class Forgetful(dict):
        __setitem__ = fail

    place = {
        "arrived": (states, "arrived"),
        "keep": (target.receive_buffer, "keep"),
        "adopt": (target.paused_requests, "adopt"),
        "stopped": (states, "stopped"),
    }
    if where == "arrived_at":
        incoming.arrived = Forgetful()
    else:
        monkeypatch.setattr(*place[where], fail)
    reserved = incoming.under_way["m"].reservation.locations.tolist()
    incoming.hear(0, handover, 1.0)
    assert target.take(messages.CommitAck) == []
    assert target.take(messages.ReserveRefused) == [messages.ReserveRefused("m", "failed")]
    assert target.take(messages.MigrationEnded) == [
        messages.MigrationEnded(0, "m", False, "failed")
    ]
    assert sorted(given) == sorted(reserved)
    assert target.receive_buffer.reserved == 0
    assert target.paused_requests.held() == set()
    assert (incoming.counts, incoming.arrived) == ({"failed": 1}, {})
    assert "could not be taken" in caplog.text
    incoming.hear(0, handover, 1.0)
    assert target.take(messages.ReserveRefused) == [messages.ReserveRefused("m", "failed")]
