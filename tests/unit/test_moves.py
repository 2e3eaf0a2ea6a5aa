"""A move under lost, repeated, late and reordered messages: never two owners, never none."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.cluster.messages import (
    Cancelled,
    Chunk,
    Got,
    Granted,
    Handover,
    Mine,
    Refused,
)
from pascal_sglang.cluster.source import OVER, SourceState
from pascal_sglang.cluster.target import TargetState
from tests.unit.move_world import WINDOW, World, terms

moves = st.lists(
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
            ]
        ),
        st.integers(0, 9),
    ),
    max_size=120,
)


@given(moves, st.booleans())
@settings(max_examples=500, deadline=None)
def test_one_owner_whatever_the_network_does(script, live):
    world = World(terms(live=live))
    ended = False
    for what, n in script:
        there, back = world.to_target, world.to_source
        if what == "pass":
            world.step()
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
    assert here != there, "nobody has it"
    assert world.source.state in OVER
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
    assert world.taken == {"kv": world.kv}


def test_the_last_piece_before_the_stop_says_so():
    """So that the target begins nothing long."""
    world = World()
    world.source.hear(Granted("m1", ["here"], 0, WINDOW), 0.1)
    pieces = []
    while not world.events:
        for piece in world.source.copy(0.1, world.kv, still=False):
            pieces.append(piece)
            world.source.hear(Got("m1", piece.end), 0.1)
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].end, world.events) == (world.kv, ["stop"])


def test_stop_and_copy_stops_before_the_first_piece():
    world = World(terms(live=False))
    world.source.hear(Granted("m1", ["here"], 0, WINDOW), 0.1)
    assert world.source.copy(0.1, world.kv, still=False) == []
    assert world.events == ["stop"]
    assert world.source.copy(0.2, world.kv, still=True) == [Chunk("m1", 0, WINDOW)]


def handed():
    """A source that has handed over, and its Handover."""
    world = World(terms(live=False), kv=10)
    world.source.hear(Granted("m1", ["here"], 0, WINDOW), 0.1)
    world.source.copy(0.1, 10, still=False)
    (handover,) = world.source.copy(0.2, 10, still=True)
    assert handover == Handover("m1", 0, 10, {"kv": 10})
    return world, handover


def test_a_refusal_costs_the_request_nothing():
    world = World()
    assert world.source.hear(Refused("m1", "full"), 0.1) == [Cancelled("m1")]
    assert (world.source.state, world.source.why) == (SourceState.KEPT, "full")
    assert world.events == []


def test_silence_before_the_handover_leaves_the_request_here():
    world = World()
    assert world.source.tick(2.5) == [Cancelled("m1")]
    assert world.source.why == "timeout"
    world = World()
    world.source.hear(Granted("m1", ["here"], 0, WINDOW), 0.1)
    world.source.copy(0.2, 100, still=False)
    assert world.source.copy(0.3, 101, still=False) == [], "one piece at a time"
    assert world.source.tick(2.5) == [Cancelled("m1")]
    assert world.running


def test_a_handover_is_said_again_until_answered_and_never_taken_back():
    world, handover = handed()
    assert world.source.tick(0.3) == []
    assert world.source.tick(0.5) == [handover]
    assert world.source.tick(99.0) == [handover], "no time-out: it may decode there already"
    assert world.source.keep("abort") == []
    assert world.source.hear(Mine("m1"), 99.1) == []
    assert world.source.state is SourceState.DONE
    assert world.source.hear(Refused("m1", "late"), 99.2) == []
    assert world.events == ["stop", "release"]


def test_a_refused_handover_brings_the_request_back():
    world, _ = handed()
    assert world.source.hear(Refused("m1", "timeout"), 0.5) == []
    assert world.events == ["stop", "resume"]


def test_what_did_not_reach_the_window_stays():
    world, _ = handed()
    assert world.source.unsent("transport") == [Cancelled("m1")]
    assert world.events == ["stop", "resume"]


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
    assert world.target.hear(Handover("m1", 0, 0, {}), 0.2) == [Refused("m1", "source died")]


def test_a_request_that_outgrows_its_reservation_stops_in_time():
    world = World(limit=105)
    world.source.hear(Granted("m1", ["here"], 0, WINDOW), 0.1)
    world.source.copy(0.1, 103, still=False)
    assert world.events == ["stop"]


def test_a_target_refuses_what_it_cannot_continue_by_name():
    world = World()
    world.target.valid = lambda state, tokens: "state of version 2"
    assert world.target.hear(Handover("m1", 0, 0, {}), 0.1) == [Refused("m1", "state of version 2")]
    assert world.events == ["drop"]
    world = World()
    assert world.target.hear(Handover("m1", 7, 9, {}), 0.1) == [Refused("m1", "a hole in the KV")]
    world = World()
    why = "outgrew its reservation"
    assert world.target.hear(Handover("m1", 0, 999, {}), 0.1) == [Refused("m1", why)]
    world = World()
    world.target.fetch = lambda begin, end: False
    assert world.target.hear(Chunk("m1", 0, 40), 0.1) == [Refused("m1", "transport")]


def test_a_piece_said_again_is_not_read_again():
    world = World()
    world.window = (0, 40)
    assert world.target.hear(Chunk("m1", 0, 40), 0.1) == [Got("m1", 40)]
    world.window = (40, 80)
    assert world.target.hear(Chunk("m1", 0, 40), 0.2) == [Got("m1", 40)]
    assert world.target.hear(Chunk("m1", 40, 80), 0.3) == [Got("m1", 80)]
