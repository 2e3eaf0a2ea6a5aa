"""Requests whose end nobody told are found, and none that lives is forgotten."""

import random

from pascal_sglang.cluster.location_check import EVERY_S, MAX_ASKED, MAX_CHARACTERS, LocationCheck
from pascal_sglang.cluster.messages import LocationReply
from pascal_sglang.cluster.request_locations import RequestLocations


class World:
    """A controller's residents and what really lives on each of two instances."""

    def __init__(self):
        self.request_locations, self.questions = RequestLocations(), []
        self.live = [set(), set()]
        self.sent, self.taken = [0, 0], [0, 0]
        self.moving, self.now = set(), 0.0
        self.check = LocationCheck(self.request_locations, self.ask, lambda: self.moving)

    def ask(self, instance, query):
        self.questions.append((instance, query))
        return True

    def place(self, rid, instance):
        self.request_locations.lives(rid, instance)
        self.sent[instance] += 1

    def take_in(self, rid, instance):
        self.live[instance].add(rid)
        self.taken[instance] += 1

    def tick(self):
        self.now += EVERY_S
        self.check.tick(self.now, dict(enumerate(self.sent)))

    def answer(self, *instances):
        for instance, query in self.questions:
            if instance in instances:
                here = [rid for rid in query.rids if rid in self.live[instance]]
                reply = LocationReply(instance, query.number, self.taken[instance], here)
                self.check.hear(reply)
        self.questions = [(i, q) for i, q in self.questions if i not in instances]

    def homes(self):
        return {rid: self.request_locations.instance_of(rid) for rid in self.request_locations}


def test_an_end_that_was_not_heard_of_is_found():
    world = World()
    for rid, instance in (("a", 0), ("b", 0), ("c", 1)):
        world.place(rid, instance)
        world.take_in(rid, instance)
    world.live[0].remove("a")
    world.tick()
    world.answer(0, 1)
    assert world.homes() == {"b": 0, "c": 1}
    assert world.check.forgotten == 1


def test_a_request_on_its_way_to_its_instance_is_not_forgotten():
    world = World()
    world.place("a", 0)
    world.tick()
    world.answer(0, 1)
    assert world.homes() == {"a": 0}
    world.take_in("a", 0)
    world.tick()
    world.answer(0, 1)
    assert world.homes() == {"a": 0}


def test_a_request_that_changes_instance_is_not_forgotten():
    world = World()
    world.place("a", 0)
    world.take_in("a", 0)
    world.tick()
    world.live = [set(), set()]
    world.answer(1)
    world.moving = {"a"}
    world.answer(0)
    assert world.homes() == {"a": 0}
    world.moving = set()
    world.tick()
    world.request_locations.lives("a", 1)
    world.answer(0, 1)
    assert world.homes() == {"a": 1}, "its home has changed since the question"


def test_a_request_whose_move_was_not_heard_of_is_found_where_it_is():
    world = World()
    world.place("a", 0)
    world.take_in("a", 0)
    world.live = [set(), {"a"}]
    world.tick()
    world.answer(0, 1)
    assert world.homes() == {"a": 1}


def test_no_request_is_forgotten_until_every_instance_has_answered():
    """It may have moved to the one that does not."""
    world = World()
    for rid, instance in (("a", 0), ("b", 1)):
        world.place(rid, instance)
        world.take_in(rid, instance)
    world.live = [set(), set()]
    world.tick()
    world.answer(0)
    world.tick()
    assert world.homes() == {"a": 0, "b": 1}
    world.answer(0, 1)
    assert world.homes() == {}


def test_a_late_answer_says_nothing():
    world = World()
    world.place("a", 0)
    world.take_in("a", 0)
    world.tick()
    late = LocationReply(0, world.questions[0][1].number, 1, [])
    world.tick()
    world.check.hear(late)
    world.check.hear(LocationReply(7, late.number + 1, 1, []))
    world.tick()
    assert world.homes() == {"a": 0}


def test_a_question_is_small_and_in_time_all_are_asked_about():
    world = World()
    for number in range(3 * MAX_ASKED):
        world.place(f"{number}", number % 2)
        world.take_in(f"{number}", number % 2)
    world.live = [set(), set()]
    for _ in range(3):
        world.tick()
        world.check.tick(world.now + 0.1, {})
        assert len(world.questions[0][1].rids) == MAX_ASKED
        world.answer(0, 1)
    assert len(world.request_locations) == 0
    for number in range(9):
        world.place(f"{number}" + "x" * (MAX_CHARACTERS // 4), 0)
    world.tick()
    assert len(world.questions[0][1].rids) == 3


def test_nothing_leaks_and_nothing_alive_is_lost_whatever_is_dropped():
    """Ends, moves and answers are dropped at random."""
    dice, world = random.Random(1), World()
    for step in range(4000):
        rid = f"{step}"
        home = dice.randrange(2)
        world.place(rid, home)
        if dice.random() < 0.9:
            world.take_in(rid, home)
        for instance in (0, 1):
            for gone in [r for r in sorted(world.live[instance]) if dice.random() < 0.2]:
                world.live[instance].remove(gone)
                if dice.random() < 0.3:
                    world.live[1 - instance].add(gone)
                elif dice.random() < 0.5:
                    world.request_locations.gone(gone)
        world.taken = list(world.sent)
        world.tick()
        world.answer(*(i for i in (0, 1) if dice.random() < 0.8))
        alive = world.live[0] | world.live[1]
        assert alive <= set(world.request_locations)
        assert len(world.request_locations) < len(alive) + 100
