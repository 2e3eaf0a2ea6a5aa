"""Draining: every request that can move does, no new one comes, and nothing else changes."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.cluster.drains import (
    AGAIN_AT_MOST_S,
    AT_ONCE,
    DRAINED,
    DRAINING,
    FULL_TRIES,
    SERVING,
    Drains,
)
from pascal_sglang.cluster.load_tracker import LoadTracker
from pascal_sglang.cluster.messages import DrainCommand, MigrationEnded
from pascal_sglang.cluster.migration_coordinator import FORGET_S, MigrationCoordinator
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.policy.placement import Placement


class World:
    """Instances with requests, the controller's part that drains them, and moves that end as a test
    says. Instances know where requests are; the controller's view follows."""

    def __init__(self, instances=3, why_none_moves=""):
        self.now = 0.0
        self.alive = list(range(instances))
        self.locations, self.placement = RequestLocations(), Placement(quantum=1, lazy=True)
        self.tracker = LoadTracker(instances)
        self.unreachable = set()
        # Moves under way: name -> command and source.
        self.moves = {}
        self.sent = Counter()
        self.coordinator = MigrationCoordinator(self.tracker, self.placement, self.order)
        self.drains = Drains(
            self.locations,
            self.coordinator,
            lambda found, source: self.placement.place(found, 0),
            why_none_moves,
        )
        self.may_end = set()

    def order(self, to, command):
        assert isinstance(command, DrainCommand)
        assert self.drains.holds(to)
        assert not self.drains.holds(command.target)
        assert command.target in self.alive
        assert self.locations.instance_of(command.rid) == to
        assert command.rid not in {c.rid for c, _ in self.moves.values()}, "it moves already"
        self.sent[command.rid] += 1
        if to in self.unreachable:
            return False
        self.moves[command.migration] = (command, to)
        return True

    def serving(self):
        found = [self.tracker.instances[i] for i in self.alive if not self.drains.holds(i)]
        assert found or not self.alive, "no instance takes requests"
        return found

    def arrive(self, rid):
        self.locations.lives(rid, self.placement.place(self.serving(), 0))

    def step(self):
        for instance in self.drains.step(self.serving(), self.now):
            assert self.locations.of(instance) == []
            self.drains.ends(instance)
            self.may_end.add(instance)
        targets = Counter(command.target for command, _ in self.moves.values())
        assert max(targets.values(), default=0) <= AT_ONCE

    def end(self, migration, *, done, why=""):
        """As the controller hears it."""
        command, source = self.moves.pop(migration)
        going = self.coordinator.over(MigrationEnded(source, migration, done, why))
        if going is None:
            return
        if self.locations.instance_of(command.rid) is not None:
            self.locations.lives(command.rid, command.target if done else source)
        self.drains.settled(going, done=done, why=why, now=self.now)

    def die(self, instance):
        self.alive.remove(instance)
        lifted = self.drains.died(instance, self.alive)
        assert not lifted or not any(map(self.drains.holds, self.alive))
        for name, (command, source) in list(self.moves.items()):
            if source == instance:
                self.end(name, done=False, why="source died")
            elif command.target == instance:
                self.end(name, done=False, why="target died")
        for rid in self.locations.of(instance):
            self.locations.gone(rid)

    def settle(self, outcome=lambda command: (True, "")):
        for _ in range(600):
            self.now += 0.1
            self.step()
            for name in list(self.moves):
                done, why = outcome(self.moves[name][0])
                self.end(name, done=done, why=why)


def filled(count=10, **more):
    world = World(**more)
    for i in range(count):
        world.locations.lives(f"r{i}", 0)
    return world


scripts = st.lists(
    st.tuples(
        st.sampled_from(
            "arrive end step step time drain undrain moved kept full die lost mute".split()
        ),
        st.integers(0, 9),
    ),
    max_size=150,
)


@given(scripts)
@settings(max_examples=400, deadline=None)
def test_whatever_happens_a_drained_instance_empties_and_somebody_serves(script):
    world, born = filled(6), 6
    stuck = {"r0", "r3"}
    for what, n in script:
        if what == "arrive" and world.alive:
            world.arrive(f"r{born}")
            born += 1
        elif what == "end" and len(world.locations):
            world.locations.gone(list(world.locations)[n % len(world.locations)])
        elif what == "step":
            world.step()
        elif what == "time":
            world.now += n / 3
        elif what == "drain":
            others = [i for i in world.alive if i != n % 3 and not world.drains.holds(i)]
            refused = world.drains.begin(n % 3, world.alive, world.now)
            assert bool(refused) == (n % 3 not in world.alive or not others) or (
                world.drains.holds(n % 3) and not refused
            )
        elif what == "undrain":
            world.drains.end(n % 3)
        elif what in ("moved", "kept", "full") and world.moves:
            name = list(world.moves)[n % len(world.moves)]
            moves = what == "moved" and world.moves[name][0].rid not in stuck
            world.end(name, done=moves, why="" if moves else "full" if what == "full" else "busy")
        elif what == "lost" and world.moves:
            # Nobody hears how it ended; it stayed.
            world.moves.pop(list(world.moves)[n % len(world.moves)])
            world.now += FORGET_S + 1
            world.coordinator.forget_old(world.now)
            for left in list(world.moves):
                world.moves.pop(left)
        elif what == "die" and len(world.alive) > 1 and n < 3 and n in world.alive:
            world.die(n)
        elif what == "mute":
            world.unreachable = {n % 3} if n < 6 else set()
        if world.alive:
            world.serving()
        for i in range(3):
            progress = world.drains.progress(i, world.now)
            assert progress.state in (DRAINING, DRAINED) if world.drains.holds(i) else SERVING
            assert sum(progress.kept.values()) + progress.moving <= progress.left
    world.unreachable = set()
    world.settle(lambda command: (command.rid not in stuck, "a session"))
    for i in world.alive:
        if world.drains.holds(i):
            left = set(world.locations.of(i))
            assert left <= stuck
            progress = world.drains.progress(i, world.now)
            assert progress.state == (DRAINING if left else DRAINED)
            assert progress.kept == ({"a session": len(left)} if left else {})


def test_a_drain_moves_everything_and_counts_it():
    world = filled(10, instances=2)
    assert world.drains.begin(0, world.alive, 0.0) == ""
    world.step()
    assert len(world.moves) == AT_ONCE
    progress = world.drains.progress(0, 0.5)
    assert (progress.state, progress.left, progress.moving) == (DRAINING, 10, AT_ONCE)
    world.settle()
    progress = world.drains.progress(0, world.now)
    assert (progress.state, progress.left, progress.moved, progress.kept) == (DRAINED, 0, 10, {})
    assert world.drains.outcomes == {"moved": 10}
    assert world.drains.left() == [0]
    assert world.drains.describe(world.now).keys() == {"0"}


def test_a_second_drain_changes_nothing_and_the_last_one_is_refused():
    world = filled(4, instances=2)
    assert world.drains.begin(0, world.alive, 0.0) == ""
    world.settle()
    assert world.drains.begin(0, world.alive, 99.0) == ""
    assert world.drains.progress(0, world.now).moved == 4
    refused = world.drains.begin(1, world.alive, 99.0)
    assert refused == "Instance 1 is the last one that takes requests."
    assert not world.drains.holds(1)
    world.drains.end(0)
    world.drains.end(0)
    assert world.drains.begin(1, world.alive, 99.0) == ""
    world.settle()
    assert len(world.locations.of(0)) == 4


def test_who_cannot_move_stays_and_says_why_and_is_asked_ever_more_rarely():
    world = filled(3, instances=2)
    world.drains.begin(0, world.alive, 0.0)
    world.settle(lambda command: (command.rid != "r1", "a session"))
    progress = world.drains.progress(0, world.now)
    assert (progress.left, progress.kept) == (1, {"a session": 1})
    assert 60 / AGAIN_AT_MOST_S <= world.sent["r1"] < 20
    world.locations.gone("r1")
    world.settle()
    assert world.drains.progress(0, world.now).state == DRAINED


def test_where_nothing_moves_requests_end_where_they_are():
    world = filled(3, instances=2, why_none_moves="--pascal-migration off")
    world.drains.begin(0, world.alive, 0.0)
    world.settle()
    progress = world.drains.progress(0, world.now)
    assert (progress.left, progress.kept) == (3, {"--pascal-migration off": 3})
    assert not world.sent


def test_a_request_without_room_elsewhere_goes_without_its_kv():
    world = filled(1, instances=2)
    world.drains.begin(0, world.alive, 0.0)
    world.settle(lambda command: (command.without_kv, "full"))
    assert world.sent["r0"] == FULL_TRIES + 1
    assert world.drains.progress(0, world.now).moved == 1


def test_another_target_is_tried_next():
    world, targets = filled(1, instances=3), []

    def refuse(command):
        targets.append(command.target)
        return False, "busy"

    world.drains.begin(0, world.alive, 0.0)
    world.settle(refuse)
    assert all(a != b for a, b in pairwise(targets))


def test_an_instance_that_dies_is_drained_no_more():
    world = filled(4, instances=3)
    world.drains.begin(0, world.alive, 0.0)
    world.step()
    world.die(0)
    assert not world.drains
    assert world.drains.begin(0, world.alive, 1.0) == "Instance 0 has died."


def test_the_last_other_ones_death_lifts_a_drain():
    world = filled(4, instances=3)
    world.drains.begin(0, world.alive, 0.0)
    world.drains.begin(1, world.alive, 0.0)
    world.settle()
    assert len(world.locations.of(2)) == 4
    world.alive.remove(2)
    assert world.drains.died(2, world.alive) == [0, 1]
    assert [i.index for i in world.serving()] == [0, 1]


def test_undrain_in_the_middle_lets_moves_end_and_orders_no_more():
    world = filled(10, instances=2)
    world.drains.begin(0, world.alive, 0.0)
    world.step()
    world.drains.end(0)
    world.settle()
    assert (len(world.locations.of(0)), len(world.locations.of(1))) == (10 - AT_ONCE, AT_ONCE)
    assert world.drains.progress(0, world.now).state == SERVING


def test_what_ends_is_not_undrained():
    world = filled(1, instances=2)
    world.drains.begin(0, world.alive, 0.0)
    assert not world.drains.told_to_end(0, 0)
    assert world.drains.told_to_end(0, 0), "a second time"
    assert not world.drains.told_to_end(0, 1), "another of its processes"
    world.settle()
    assert world.may_end == {0}
    assert world.drains.end(0) == "Instance 0 was told to end, and ends."
    assert world.drains.holds(0)
    world.die(0)
    assert not world.drains


@pytest.mark.parametrize("undrained", [False, True])
def test_an_instance_that_was_told_to_end_ends_when_it_is_empty(undrained):
    world = filled(5, instances=2)
    world.drains.begin(0, world.alive, 0.0)
    assert not world.drains.told_to_end(0, 0)
    world.step()
    assert world.may_end == set()
    if undrained:
        world.drains.end(0)
    world.settle()
    assert world.may_end == (set() if undrained else {0})


def test_a_request_on_its_way_here_is_waited_for():
    """Its move began before the drain."""
    world = filled(1, instances=2)
    world.locations.lives("r0", 1)
    world.drains.begin(1, world.alive, 0.0)
    world.step()
    (name,) = world.moves
    world.drains.end(1)
    world.drains.begin(0, world.alive, 0.0)
    assert not world.drains.told_to_end(0, 0)
    assert world.drains.progress(0, 0.0).state == DRAINING
    world.now += 1.0
    world.step()
    assert world.may_end == set()
    world.end(name, done=True)
    world.settle()
    assert (world.locations.of(1), world.may_end) == (["r0"], {0})
