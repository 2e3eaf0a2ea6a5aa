"""A move under lost, repeated, late and reordered messages: never two owners, never none."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.cluster.messages import (
    Cancelled,
    Chunk,
    Granted,
    Handover,
    Mine,
    Ready,
    Refused,
    Yours,
)
from pascal_sglang.cluster.source import Source, SourceState, Terms
from pascal_sglang.cluster.target import Target, TargetState

TERMS = Terms(chunk=40, tail=5, patience_s=2.0, repeat_s=0.25)


class World:
    """Two sides of a move and everything they own, with the network in between."""

    def __init__(self, terms=TERMS, kv=100, limit=160):
        self.now, self.kv, self.limit = 0.0, kv, limit
        self.running, self.events, self.taken = True, [], None
        self.source = Source("m1", "r", terms, self.pause, self.snapshot, self.resume, self.release)
        self.target = Target("m1", "r", terms, self.take, self.drop, lambda state: None)
        self.asked = False
        self.to_target, self.to_source = [], []
        self.to_target += self.source.begin(self.now, kv, limit)

    def pause(self):
        assert self.running
        self.running = False
        self.events.append("pause")
        return self.kv

    def snapshot(self):
        return {"kv": self.kv}

    def resume(self):
        assert not self.running
        self.running = True
        self.events.append("resume")

    def release(self):
        assert not self.running
        self.events.append("release")

    def take(self, state, aborted):
        self.taken = (state, aborted)
        self.events.append("take")

    def drop(self):
        self.events.append("drop")

    def deliver_to_target(self, at):
        message = self.to_target[at]
        if not self.asked:
            # Only an Ask reserves; before it the move is unknown here.
            if type(message).__name__ == "Ask":
                self.asked = True
                self.to_source += self.target.begin(self.now)
            return
        if isinstance(message, Chunk):
            self.to_source += self.target.received(message, self.now)
        elif type(message).__name__ != "Ask":
            self.to_source += self.target.hear(message, self.now)

    def deliver_to_source(self, at):
        self.to_target += self.source.hear(self.to_source[at], self.now)

    def step(self):
        """A pass on both sides."""
        if self.running and self.source.state not in (SourceState.GIVEN, SourceState.DONE):
            self.kv = min(self.limit, self.kv + 1)
        self.to_target += self.source.copy(self.now, self.kv)
        self.to_target += self.source.tick(self.now)
        if self.asked:
            self.to_source += self.target.tick(self.now)

    def check(self):
        here = self.source.state not in (SourceState.GIVEN, SourceState.DONE)
        there = self.target.state is TargetState.OWNED
        assert not (here and there), "two owners"
        assert self.events.count("release") == (0 if here else 1)
        assert self.events.count("take") <= 1
        assert self.events.count("drop") <= 1
        if there:
            assert self.target.upto >= self.taken[0]["kv"], "a hole in the KV"
        return here, there

    def settle(self):
        """From now on nothing is lost: the move comes to an end."""
        for _ in range(60):
            self.now += 0.2
            self.step()
            while self.to_target or self.to_source:
                if self.to_target:
                    self.deliver_to_target(0)
                    self.to_target.pop(0)
                if self.to_source:
                    self.deliver_to_source(0)
                    self.to_source.pop(0)
                self.check()


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
    world = World(Terms(live=live, chunk=40, tail=5, patience_s=2.0, repeat_s=0.25))
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
        elif what == "abort" and n == 0:
            world.target.abort()
        world.check()
    world.settle()
    here, there = world.check()
    assert here != there, "nobody has it"
    if there:
        assert not ended
        assert "drop" not in world.events
        assert world.source.state is SourceState.DONE
    else:
        assert world.running, "paused for ever"
        assert not world.asked or world.target.state is TargetState.DROPPED
    assert world.events.count("pause") == world.events.count("resume") + world.events.count(
        "release"
    )


def test_without_trouble_it_moves_and_pauses_for_the_tail_alone():
    world = World()
    world.settle()
    assert world.check() == (False, True)
    assert world.events == ["pause", "release", "take"]
    assert world.taken == ({"kv": world.kv}, False)


def test_a_refusal_costs_the_request_nothing():
    world = World()
    assert world.source.hear(Refused("m1", "full"), 0.1) == [Cancelled("m1")]
    assert (world.source.state, world.source.why) == (SourceState.KEPT, "full")
    assert world.events == []


def test_silence_before_the_handover_and_after_it_leaves_the_request_here():
    world = World()
    assert world.source.tick(2.5) == [Cancelled("m1")]
    assert world.source.why == "timeout"
    world = World(Terms(live=False))
    out = world.source.hear(Granted("m1"), 0.1)
    assert isinstance(out[-1], Handover)
    assert not world.running
    world.source.tick(3.0)
    assert world.running
    assert world.source.hear(Ready("m1"), 3.1) == [Cancelled("m1")], "the word stands"


def test_what_was_given_stays_given():
    world = World(Terms(live=False))
    world.source.hear(Granted("m1"), 0.1)
    assert world.source.hear(Ready("m1"), 0.2) == [Yours("m1")]
    assert world.source.keep("abort") == []
    assert world.source.hear(Refused("m1", "timeout"), 0.3) == []
    assert world.source.hear(Ready("m1"), 9.0) == [Yours("m1")]
    assert world.source.hear(Mine("m1"), 9.1) == []
    assert world.source.state is SourceState.DONE


def test_a_state_that_cannot_be_continued_is_refused_by_name():
    world = World()
    world.target.valid = lambda state: "version 2 is unknown"
    world.target.begin(0.0)
    assert world.target.hear(Handover("m1", 0, {}), 0.1) == [Refused("m1", "version 2 is unknown")]
    assert world.events == ["drop"]


def test_an_abort_during_the_move_is_not_forgotten():
    world = World(Terms(live=False))
    world.target.abort()
    world.settle()
    assert world.taken == ({"kv": world.kv}, True)


def test_a_target_drops_what_a_dead_source_had_not_let_go_of():
    world = World(Terms(live=False))
    world.target.begin(0.0)
    world.target.source_died()
    assert world.events == ["drop"]
    assert world.target.hear(Handover("m1", 0, {}), 0.2) == [Refused("m1", "source died")]
