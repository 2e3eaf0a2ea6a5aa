"""A move under lost, repeated, late and reordered messages: never two owners, never none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.cluster.messages import (
    ChunkAck,
    CommitAck,
    Handover,
    KVChunk,
    MigrationCancelled,
    ReserveGranted,
    ReserveRefused,
    WriteQuery,
)
from pascal_sglang.cluster.migration_source import OVER, WINDOWS, SourceState
from pascal_sglang.cluster.migration_target import TargetState
from tests.unit.migration_world import LAST, SLOT_TOKENS, TERMS, World, before_of, terms

migrations = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "pass",
                "time",
                "deliver",
                "back",
                "lose",
                "lose back",
                "again",
                "again back",
                "abort",
                "end",
                "stop",
                "late",
            ]
        ),
        st.integers(0, 9),
    ),
    max_size=120,
)


@given(migrations, st.booleans(), st.booleans())
@settings(max_examples=500, deadline=None)
def test_one_owner_whatever_the_network_does(script, live, waits):
    world = World(terms(live=live), waits=waits)
    ended = False
    for what, n in script:
        there, back = world.to_target, world.to_source
        if what == "pass":
            world.step()
        elif what == "stop":
            # One side, both or none, until this comes again.
            world.stopped = {side for side, bit in (("source", 1), ("target", 2)) if n & bit}
            world.now += n
        elif what == "late":
            world.writes_late, world.reads_late = bool(n & 1), bool(n & 2)
        elif what == "time":
            world.now += n / 5
        elif what in ("deliver", "again") and there:
            world.deliver_to_target(n % len(there))
            if what == "deliver":
                there.pop(n % len(there))
        elif what in ("back", "again back") and back:
            at = n % len(back)
            world.deliver_to_source(at)
            if what == "back":
                back.pop(at)
        elif what == "lose" and there:
            there.pop(n % len(there))
        elif what == "lose back" and back:
            back.pop(n % len(back))
        elif what == "end" and world.running and n == 0:
            ended = True
            there += world.source.keep("finished")
        elif what == "abort" and n == 0 and world.asked:
            back += world.target.give_up("aborted")
        world.check()
    world.settle()
    here, there = world.check()
    lost = world.source.state is SourceState.LOST
    assert [here, there, lost].count(True) == 1, "nobody has it, or two"
    assert world.source.state in OVER
    if lost:
        assert world.events.count("take") == world.events.count("revoke")
        return
    if there:
        assert not ended
        assert world.source.state is SourceState.DONE
    else:
        assert not world.asked or world.target.state is TargetState.DROPPED
    assert world.events.count("stop") == world.events.count("resume") + world.events.count(
        "release"
    )


def test_without_trouble_it_moves_and_stops_for_the_tail_alone():
    world = World()
    world.settle()
    assert world.check() == (False, True)
    assert world.events == ["stop", "take", "release"]
    assert world.taken == b"%d" % world.kv


def test_a_request_that_waits_moves_in_one_word():
    world = World(waits=True)
    assert world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1) == []
    assert world.source.copy(0, still=False) == []
    assert world.source.copy(0, still=True) == [Handover("m1", 0, 0, 0, b"0")]
    world = World(waits=True)
    world.settle()
    assert world.check() == (False, True)
    assert world.events == ["stop", "take", "release"]


def test_the_last_piece_before_the_stop_says_so():
    """So that the target begins nothing long."""
    world = World()
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    pieces = []
    while not world.events:
        world.source.copy(world.kv, still=False)
        for piece in world.source.written(world.now):
            pieces.append(piece)
            world.source.hear(ChunkAck("m1", piece.end), 0.1)
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].end, world.events) == (world.kv, ["stop"])


def test_stop_and_copy_stops_before_the_first_piece():
    world = World(terms(live=False))
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    assert world.source.copy(world.kv, still=False) == []
    assert world.events == ["stop"]
    assert world.source.copy(world.kv, still=True) == [KVChunk("m1", 0, SLOT_TOKENS, 0, False)]


def handed():
    """A source that has handed over, and its Handover."""
    world = World(terms(live=False), kv=10)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.copy(10, still=False)
    (handover,) = world.source.copy(10, still=True)
    assert handover == Handover("m1", 0, 10, 0, b"10")
    assert world.source.written(0.2) == [handover]
    return world, handover


def stopped():
    """A source whose last piece is being written."""
    world = World(terms(live=False), kv=10)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.copy(10, still=False)
    assert len(world.source.copy(10, still=True)) == 1
    return world


def test_a_refusal_costs_the_request_nothing():
    world = World()
    assert world.source.hear(ReserveRefused("m1", "full"), 0.1) == [MigrationCancelled("m1")]
    assert (world.source.state, world.source.why) == (SourceState.KEPT, "full")
    assert world.events == []


def test_silence_before_the_handover_leaves_the_request_here():
    world = World()
    assert world.source.tick(2.5) == [MigrationCancelled("m1")]
    assert world.source.why == "timeout"
    world = World()
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    for _ in range(WINDOWS):
        assert len(world.source.copy(100, still=False)) == 1
        assert world.source.copy(100, still=False) == [], "the last one is being written"
        assert len(world.source.written(world.now)) == 1
    assert world.source.copy(101, still=False) == [], "all windows are full"
    assert world.source.tick(2.5) == [MigrationCancelled("m1")]
    assert world.running


def test_a_target_that_fails_to_take_it_over_leaves_it_at_its_source():
    """And says the same to a Handover that comes again."""
    world = World()
    world.target.fails = True
    world.settle()
    assert world.check() == (True, False)
    assert world.events == ["stop", "drop", "resume"]
    world.target.fails = False
    again = Handover("m1", 0, world.kv, before_of(world.kv), b"")
    assert world.target.hear(again, world.now) == [ReserveRefused("m1", "failed")]
    assert world.source.state is SourceState.KEPT


def test_a_handover_is_said_again_until_answered_and_never_taken_back():
    world, handover = handed()
    assert world.source.tick(0.3) == []
    assert world.source.tick(0.5) == [handover]
    assert world.source.tick(99.0) == [handover], "it may decode there already"
    assert world.source.keep("abort") == []
    assert world.source.hear(CommitAck("m1"), 99.1) == []
    assert world.source.state is SourceState.DONE
    assert world.source.hear(ReserveRefused("m1", "late"), 99.2) == []
    assert world.events == ["stop", "release"]


def times_out(world, now=0.2):
    """Say it until the source gives up; what it said, and after how many seconds."""
    began, said = now, []
    while world.source.state is SourceState.HANDED:
        now += 0.01
        said += world.source.tick(now)
    return said, now - began


def test_a_target_that_never_answers_ends_the_request_and_is_told_until_it_hears():
    """The target may have taken over before it was stopped: the source does not go on."""
    world, handover = handed()
    said, took = times_out(world)
    assert said == [handover] * (TERMS.handovers - 1) + [MigrationCancelled("m1")]
    assert 9 < took < 11
    assert (world.source.why, world.events) == ("no answer", ["stop", "lose"])
    assert world.source.keep("abort") == []
    assert (
        world.source.tick(20.0)
        == world.source.hear(CommitAck("m1"), 20.1)
        == [MigrationCancelled("m1")]
    )
    assert world.source.state is SourceState.REVOKING
    assert world.source.hear(ReserveRefused("m1", "cancelled"), 20.2) == []
    assert world.source.state is SourceState.LOST
    assert world.source.tick(99.0) == []


def test_a_target_that_never_answers_is_not_told_for_ever():
    world, _ = handed()
    times_out(world)
    now, said = 10.0, []
    while world.source.state is SourceState.REVOKING:
        now += 1.0
        said += world.source.tick(now)
        assert now < 3600
    assert len(said) == TERMS.cancellations - 1
    world, _ = handed()
    times_out(world)
    world.source.target_died()
    assert world.source.state is SourceState.LOST
    assert world.events == ["stop", "lose"]


def test_a_source_that_was_stopped_itself_hears_before_it_gives_up():
    """An hour without a pass is one Handover without an answer."""
    world, handover = handed()
    assert world.source.tick(3600.0) == [handover]
    assert world.source.hear(CommitAck("m1"), 3600.1) == []
    assert world.events == ["stop", "release"]


def test_a_target_that_took_over_drops_the_request_when_it_hears():
    world = World(terms(live=False), kv=0)
    world.received, world.slot = 0, {LAST: (0, 0, 0)}
    handover = Handover("m1", 0, 0, 0, b"0")
    assert world.target.hear(handover, 0.1) == [CommitAck("m1")]
    for _ in range(2):
        assert world.target.hear(MigrationCancelled("m1"), 60.0) == [
            ReserveRefused("m1", "cancelled")
        ]
    assert world.target.hear(handover, 60.1) == [ReserveRefused("m1", "cancelled")]
    assert world.events == ["take", "revoke"]


def test_a_source_that_is_asked_whether_it_writes_stops_and_says_so():
    world = World()
    assert world.source.hear(WriteQuery("m1"), 0.1) == [MigrationCancelled("m1")]
    assert world.source.state is SourceState.KEPT
    world, _ = handed()
    assert world.source.hear(WriteQuery("m1"), 0.3) == [MigrationCancelled("m1")]
    assert world.events == ["stop", "resume"]


def test_a_refused_handover_brings_the_request_back():
    world, _ = handed()
    assert world.source.hear(ReserveRefused("m1", "timeout"), 0.5) == [MigrationCancelled("m1")]
    assert world.events == ["stop", "resume"]


def test_what_did_not_reach_the_slot_stays():
    world = stopped()
    assert world.source.unsent("transport") == [MigrationCancelled("m1")]
    assert world.events == ["stop", "resume"]


@pytest.mark.parametrize("why", ["timeout", "target died", "aborted", "refused"])
def test_a_request_is_its_sources_until_all_of_it_is_in_the_slot(why):
    world = stopped()
    assert world.source.copy(10, still=True) == [], "it is being written"
    assert world.source.tick(1.0) == [], "nothing is said of it"
    if why == "timeout":
        assert world.source.tick(9.0) == [MigrationCancelled("m1")]
    elif why == "target died":
        world.source.target_died()
    elif why == "aborted":
        assert world.source.keep(why) == [MigrationCancelled("m1")]
    else:
        assert world.source.hear(ReserveRefused("m1", "refused"), 1.0) == [MigrationCancelled("m1")]
    assert (world.source.why, world.events) == (why, ["stop", "resume"])
    assert world.source.written(9.0) == []


@pytest.mark.parametrize("live", [True, False])
def test_without_room_a_request_does_not_stop(live):
    """Its reader would wait for what others write."""
    world = World(terms(live=live), kv=100, limit=160)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.sent = 99
    for _ in range(3):
        assert world.source.copy(100, still=False, room=False) == []
    assert world.events == []
    assert world.source.copy(100, still=False) == []
    assert world.events == ["stop"]


def test_over_a_network_what_is_left_goes_in_pieces_too():
    """What a network does not carry in time, it does not carry while the reader waits either."""
    world = World(terms(live=False), kv=30)
    world.source.over_network, world.source.link_tokens = True, 16
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.copy(30, still=False)
    assert world.source.copy(30, still=True) == [KVChunk("m1", 0, 16, 0, False)]
    world.source.written(0.2)
    assert world.source.copy(30, still=True) == [], "until the piece is read"
    world.source.hear(ChunkAck("m1", 16), 0.3)
    assert world.source.copy(30, still=True) == [Handover("m1", 16, 30, 0, b"30")]


def test_without_room_nothing_is_written_and_a_request_that_is_full_stops_all_the_same():
    world = World(kv=100, limit=160)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    assert world.source.copy(100, still=False, room=False) == []
    assert (world.source.passes, world.source.pieces) == (1, 0)
    world.source.sent = 150
    assert world.source.copy(158, still=False, room=False) == []
    assert world.events == ["stop"]
    world.running = False
    assert world.source.copy(158, still=True, room=False) == []
    assert len(world.source.copy(158, still=True)) == 1


def test_a_dead_target_ends_only_what_it_may_have_answered():
    world, _ = handed()
    world.source.target_died()
    assert (world.source.state, world.events) == (SourceState.LOST, ["stop", "lose"])
    world = World()
    world.source.target_died()
    assert (world.source.state, world.events) == (SourceState.KEPT, [])


def test_a_dead_source_leaves_nothing_behind():
    world = World()
    world.target.give_up("source died")
    assert world.events == ["drop"]
    assert world.target.hear(Handover("m1", 0, 0, 0, b""), 0.2) == [
        ReserveRefused("m1", "source died")
    ]


def test_a_request_that_fills_its_reservation_stops_if_little_is_left_and_stays_if_much_is():
    """What is left when it stops is what its reader waits for."""
    world = World(limit=105)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    assert world.source.copy(103, still=False) == [MigrationCancelled("m1")]
    assert (world.source.why, world.events) == ("outgrew its reservation", [])
    world = World(limit=45, kv=40)
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.copy(40, still=False)
    world.source.written(world.now)
    assert world.source.copy(42, still=False) == [], "the piece is on its way"
    world.source.hear(ChunkAck("m1", 40), 0.3)
    world.source.copy(43, still=False)
    assert (world.source.state, world.events) == (SourceState.STOPPING, ["stop"])


def test_a_piece_is_what_the_link_carries_in_a_step():
    world = World()
    world.source.hear(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS), 0.1)
    world.source.link_tokens = 13
    (piece,) = world.source.copy(100, still=False)
    assert (piece.begin, piece.end) == (0, 13)


def test_a_target_refuses_what_it_cannot_continue_by_name():
    world = World(kv=0)
    world.target.wrong = "state of version 2"
    assert world.target.hear(Handover("m1", 0, 0, 0, b""), 0.1) == [
        ReserveRefused("m1", "state of version 2")
    ]
    assert world.events == ["drop"]
    world = World()
    assert world.target.hear(Handover("m1", 7, 99, 75, b""), 0.1) == [
        ReserveRefused("m1", "a hole in the KV")
    ]
    world = World()
    why = "outgrew its reservation"
    assert world.target.hear(Handover("m1", 0, 999, 75, b""), 0.1) == [ReserveRefused("m1", why)]
    world = World()
    world.target.unreadable = True
    assert world.target.hear(KVChunk("m1", 0, 40, 75, False), 0.1) == [
        ReserveRefused("m1", "transport")
    ]


def test_a_window_only_slides_on():
    """What the target has reserved nothing for, or an earlier piece left out, is seen no more."""
    hole = [ReserveRefused("m1", "a hole in the KV")]
    world = World()
    assert world.target.hear(KVChunk("m1", 0, 40, 74, False), 0.1) == hole
    world = World()
    world.slot = {0: (0, 40, 80)}
    world.target.hear(KVChunk("m1", 0, 40, 80, False), 0.1)
    assert world.target.hear(Handover("m1", 40, 101, 79, b""), 0.2) == hole
    world = World(kv=0)
    assert world.target.hear(Handover("m1", 0, 0, 1, b""), 0.1) == hole
    assert world.events == ["drop"]


def test_a_piece_said_again_is_not_read_again():
    world = World()
    world.slot = {0: (0, 40, 75), 1: (40, 80, 76)}
    assert world.target.hear(KVChunk("m1", 0, 40, 75, False), 0.1) == [ChunkAck("m1", 40)]
    assert world.target.hear(KVChunk("m1", 0, 40, 75, False), 0.2) == [ChunkAck("m1", 40)]
    assert world.target.hear(KVChunk("m1", 40, 80, 76, False), 0.3) == [ChunkAck("m1", 80)]
