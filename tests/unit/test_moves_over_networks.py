"""A network that carries pieces late, or never: the source waits for nothing, and its target hears
that nothing is written any more only once that is so. `LateNetwork` stands for the real one
(`test_transport_hosts`), which cannot be stopped at a chosen instant."""

import dataclasses

import pytest

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.messages import MigrateCommand
from pascal_sglang.cluster.migration_pace import NETWORK_S, PIECE_TOKENS, NetworkPace
from pascal_sglang.cluster.transport import Transport, TransportError, Write
from pascal_sglang.engine.migration.outgoing import QUIET_S
from pascal_sglang.engine.migration.outgoing_kv import FAILED
from pascal_sglang.engine.migration.receive_buffer import SLOTS
from pascal_sglang.policy.request import RequestStatus
from tests.unit import test_migration_copies as copies
from tests.unit.test_migration_copies import TOKENS

CANCELLED = messages.MigrationCancelled("m")
pair = copies.pair
QUERY = messages.WriteQuery("m")


class LateWrite(Write):
    """Arrives when the test says so."""

    def __init__(self, there):
        super().__init__(memoryview(bytearray(len(there))))
        self.there, self.done, self.rests, self.given_up = there, None, True, False

    def arrive(self):
        assert self.begun
        self.there[:] = self.memory
        self.done = True

    def query(self):
        return False if self.given_up else self.done

    @property
    def seconds(self):
        return NETWORK_S

    def abandon(self):
        self.given_up = True

    @property
    def at_rest(self):
        return self.rests and (self.done is not None or self.given_up)


class LateNetwork(Transport):
    kind, direct, writes = "late", False, 2

    def __init__(self, target):
        self.target, self.begun, self.broken = target, [], False

    def room(self, address, offset, size):
        if self.broken:
            raise TransportError("earlier writes are still under way")
        write = LateWrite(self.target.transport.receive_buffer[offset : offset + size])
        self.begun.append(write)
        return write

    def close(self):
        pass


class Sides:
    """A source that moves requests to a target over a network."""

    def __init__(self, pair, deferred, pieces=64, *, live=True):
        self.source, self.target = pair
        self.network = LateNetwork(self.target)
        self.out = self.source.outgoing_migrations
        self.out.transport, self.now = self.network, 1.0
        self.out.terms = dataclasses.replace(self.out.terms, live=live)
        self.out.pace.network = NetworkPace(64, pieces)
        self.source.copies.deferred = self.target.copies.deferred = deferred
        if not deferred:
            for side in pair:
                side.copies.__class__ = copies.HostCopies
        self.order("m")

    def order(self, name, req=None):
        if req is not None:
            self.source.scheduler.running_batch.reqs.append(req)
        rid = "r" if req is None else req.rid
        self.out.ordered(MigrateCommand(name, rid, 1), self.now)
        (ask,) = self.source.take(messages.ReserveRequest)
        self.target.incoming_migrations.asked(0, ask, self.now)
        (granted,) = self.target.take(messages.ReserveGranted)
        self.out.hear(1, granted, self.now)
        self.step()

    def step(self, seconds=0.0):
        self.now += seconds
        for side in (self.source, self.target):
            side.states.pass_info.now = self.now
            side.states.pass_info.pass_no += 1
        self.source.transfers.heard(*self.source.transfers.progress())
        self.target.transfers.heard(*self.target.transfers.progress())
        self.out.step(self.source.scheduler.running_batch, self.now)
        self.target.incoming_migrations.step(self.now)

    @property
    def write(self):
        return self.network.begun[-1]

    def said(self, kind):
        return self.source.take(kind)

    def answers(self):
        self.out.hear(1, QUERY, self.now)
        return self.said(messages.MigrationCancelled)


@pytest.fixture(params=[True, False], ids=["beside", "at once"])
def sides(request, pair):
    return Sides(pair, request.param)


def test_what_is_said_of_a_piece_waits_for_the_network(sides):
    request = copies.request_of(sides.source)
    for _ in range(3):
        sides.step()
        assert sides.said(messages.KVChunk) == []
    sides.write.arrive()
    sides.step()
    (chunk,) = sides.said(messages.KVChunk)
    assert (chunk.begin, chunk.end) == (0, TOKENS)
    sides.target.incoming_migrations.hear(0, chunk, sides.now)
    sides.step()
    sides.out.hear(1, *sides.target.take(messages.ChunkAck), sides.now)
    sides.step()
    assert request not in sides.source.scheduler.running_batch.reqs, "it has stopped"
    for _ in range(3):
        sides.step()
    if len(sides.network.begun) > 1:  # Nothing is left to write, unless it gained some.
        assert sides.said(messages.Handover) == []
        sides.write.arrive()
        sides.step()
    (handover,) = sides.said(messages.Handover)
    sides.target.incoming_migrations.hear(0, handover, sides.now)
    assert sides.target.take(messages.CommitAck)
    sides.step()
    assert sides.target.receive_buffer.slots.free == SLOTS


def test_a_last_piece_that_does_not_arrive_brings_the_request_back(sides):
    request = copies.request_of(sides.source)
    sides.write.arrive()
    sides.step()
    sides.target.incoming_migrations.hear(0, *sides.said(messages.KVChunk), sides.now)
    sides.step()
    request.kv.kv_committed_len += 3
    sides.out.hear(1, *sides.target.take(messages.ChunkAck), sides.now)
    for _ in range(3):
        sides.step()
    assert len(sides.network.begun) == 2
    assert request not in sides.source.scheduler.running_batch.reqs, "it has stopped"
    sides.step(3.0)
    assert sides.out.counts == {"kept:timeout": 1}
    assert ("stopped", RequestStatus.RESIDENT) in sides.source.said
    assert sides.said(messages.Handover) == []


def test_a_move_that_is_over_says_so_when_its_piece_has_arrived(sides):
    copies.request_of(sides.source).over = True
    sides.step()
    assert (sides.out.under_way, sides.out.counts) == ({}, {"kept:ended": 1})
    assert sides.answers() == [], "the network still writes"
    if not sides.write.begun:
        return  # Given up before it was sent; the next test has that.
    sides.write.arrive()
    sides.step()
    assert sides.said(messages.MigrationCancelled) == [CANCELLED]
    assert sides.out.closing == {}
    assert sides.answers() == [CANCELLED]
    sides.target.incoming_migrations.hear(0, CANCELLED, sides.now)
    assert sides.target.receive_buffer.slots.free == SLOTS


def test_a_piece_that_failed_is_quiet_for_a_while_before_its_slot_is_given_away(sides):
    sides.step()
    sides.write.done = False
    sides.write.rests = False
    sides.step()
    assert sides.out.counts == {"kept:transport": 1}
    assert copies.request_of(sides.source) in sides.source.scheduler.running_batch.reqs
    for _ in range(3):
        sides.step(QUIET_S + 1)
        assert sides.answers() == [], "the engine may still send it"
    sides.write.rests = True
    sides.step()
    sides.step(QUIET_S - 1)
    assert sides.answers() == [], "what was sent may be on its way"
    sides.step(2)
    assert sides.said(messages.MigrationCancelled) == [CANCELLED]
    assert sides.out.closing == {}


def test_a_network_that_carries_nothing_is_given_up_and_asked_for_less(sides):
    sides.step()
    sides.step(sides.out.terms.patience_s + 0.1)
    assert sides.out.counts == {"kept:timeout": 1}
    sides.step()
    assert sides.write.given_up
    assert sides.out.pace.network.piece_tokens == PIECE_TOKENS
    sides.step()
    sides.step(QUIET_S + 0.1)
    assert sides.said(messages.MigrationCancelled) == [CANCELLED]


def test_stop_and_copy_hands_a_network_no_more_than_it_carries(pair):
    sides = Sides(pair, False, PIECE_TOKENS, live=False)
    sides.step()
    piece = sides.out.under_way["m"].writing
    assert piece == messages.KVChunk("m", 0, PIECE_TOKENS, 0, False)


def test_without_room_to_write_from_the_request_stays(sides):
    sides.write.done = False
    sides.step()
    sides.step()
    sides.network.broken = True
    sides.order("n")
    sides.step()
    assert sides.out.counts == {"kept:transport": 2}


def test_more_moves_than_writes_take_turns(pair):
    sides = Sides(pair, False)
    sides.out.pace.network = NetworkPace(64)
    others = [copies.Request() for _ in range(2)]
    for name, req in zip("no", others, strict=True):
        req.rid = name
        sides.order(name, req)
    assert len(sides.network.begun) == 2, "the third one waits"
    sides.write.arrive()
    sides.step()
    assert len(sides.network.begun) == 3
    first, second, third = sides.network.begun
    assert not first.done
    assert second.done
    third.arrive()
    sides.step()
    (chunk, other) = sides.said(messages.KVChunk)
    assert (chunk.migration, other.migration) == ("n", "o")
    assert len(sides.network.begun) == 4, "the one that waited longest"


def test_pieces_grow_to_what_a_network_carries_in_a_while():
    pace, sizes = NetworkPace(512), []
    for _ in range(8):
        sizes.append(pace.piece_tokens)
        pace.went(pace.piece_tokens, 0.05 + pace.piece_tokens * 1e-3)
    assert sizes[:3] == [16, 32, 64]
    assert 0.8 * NETWORK_S < 0.05 + sizes[-1] * 1e-3 < 1.2 * NETWORK_S
    assert pace.pieces(3000) == 7
    for _ in range(9):
        pace.went(pace.piece_tokens, 1e-4)
    assert (pace.piece_tokens, pace.pieces(3000)) == (512, 6)
    pace.went(1, 1e-4)
    assert pace.piece_tokens == 512
    pace.failed()
    assert pace.piece_tokens == 128
    pace.went(1, 1e-4)
    assert pace.piece_tokens == 128, "a short one says nothing"
    pace.went(1, 2 * NETWORK_S)
    assert pace.piece_tokens == 64


def test_a_piece_has_arrived_when_it_has_on_every_rank(sides, monkeypatch):
    """The slowest one says how fast it went."""
    theirs = 0.0
    monkeypatch.setattr(
        "pascal_sglang.engine.migration.outgoing.least",
        lambda scheduler, *ours: [min(value, theirs) for value in ours],
    )
    sides.step()
    sides.write.arrive()
    sides.step()
    assert sides.said(messages.KVChunk) == [], "it is under way on the other one"
    theirs = TOKENS / (4 * NETWORK_S)
    sides.step()
    assert len(sides.said(messages.KVChunk)) == 1
    assert sides.out.pace.network.piece_tokens == PIECE_TOKENS, "it took four times too long"


def test_a_piece_that_failed_on_another_rank_has_failed(sides, monkeypatch):
    theirs, at_rest = FAILED, False
    monkeypatch.setattr(
        "pascal_sglang.engine.migration.outgoing.least",
        lambda scheduler, *ours: [min(value, theirs) for value in ours],
    )
    monkeypatch.setattr(
        "pascal_sglang.engine.migration.outgoing.all_agree",
        lambda scheduler, holds: holds and at_rest,
    )
    sides.step()
    assert sides.out.counts == {}, "it is under way here, and may arrive"
    sides.write.arrive()
    sides.step()
    assert sides.out.counts == {"kept:transport": 1}
    sides.step(QUIET_S + 1)
    assert sides.answers() == [], "there the engine may still send it"
    at_rest = True
    sides.step()
    sides.step(QUIET_S + 1)
    assert sides.said(messages.MigrationCancelled) == [CANCELLED]
