"""A slot is never given to a move while the source of an earlier one may still write into it,
whatever is lost and whoever is stopped in the middle of a write for however long."""

import random
from dataclasses import dataclass
from typing import Any

from pascal_sglang.cluster.messages import (
    Handover,
    KVChunk,
    MigrationCancelled,
    ReserveGranted,
    ReserveRequest,
)
from pascal_sglang.cluster.messages import WriteQuery as Query
from pascal_sglang.cluster.migration_source import (
    OVER,
    WINDOWS,
    MigrationSource,
    SourceState,
    Terms,
)
from pascal_sglang.cluster.migration_target import MigrationTarget
from pascal_sglang.cluster.receive_slots import ASK_AT_MOST_S, ASK_S, DEAD_S, ReceiveSlots

COUNT, SENDERS, PIECE = 2, 3, 40
# How often what happens that `played` chooses from.
WEIGHTS = (25, 60, 6, 6, 3)


def test_a_slot_goes_to_the_next_move_once_its_source_is_through():
    slots = ReceiveSlots(1)
    slot = slots.take()
    assert slots.free == 0
    slots.give_back(slot)
    assert slots.take() == slot
    slots.doubt(slot, "m", 3, 0.0, dead=False)
    slots.confirmed("m", 4)
    slots.confirmed("n", 3)
    assert (slots.free, slots.in_doubt) == (0, 1)
    slots.confirmed("m", 3)
    slots.confirmed("m", 3)
    assert (slots.free, slots.in_doubt) == (1, 0)


def test_a_source_that_says_nothing_is_asked_for_ever_and_ever_less_often():
    slots = ReceiveSlots(1)
    slots.doubt(slots.take(), "m", 3, 0.0, dead=False)
    asked = [t for t in range(1000) if slots.tick(float(t)) == [(3, "m")]]
    assert asked[:3] == [ASK_S, 3 * ASK_S, 7 * ASK_S]
    assert asked[-1] - asked[-2] == ASK_AT_MOST_S
    assert slots.free == 0


def test_a_source_that_has_died_is_waited_for_once_more():
    slots = ReceiveSlots(2)
    slots.doubt(slots.take(), "m", 3, 0.0, dead=False)
    slots.doubt(slots.take(), "n", 4, 0.0, dead=True)
    slots.died(3, 1.0)
    slots.tick(DEAD_S - 0.1)
    assert slots.free == 0
    slots.tick(DEAD_S)
    assert slots.free == 1
    slots.tick(DEAD_S + 1.0)
    assert (slots.free, slots.in_doubt) == (2, 0)


class Source(MigrationSource):
    """A source whose request does nothing."""

    def nothing(self):
        pass

    stop = learn = resume = release = lose = nothing

    def snapshot(self):
        return b""


@dataclass(kw_only=True, slots=True, eq=False)
class Target(MigrationTarget):
    """A target with a slot of a world's receive buffer."""

    move: Any
    pieces: int = 0

    def fetch(self, begin, end, before, *, stopped):
        window = 0 if stopped else self.pieces % WINDOWS
        self.pieces += not stopped
        written = self.move.world.memory[self.move.slot, window]
        assert begin == end or written == (self.migration, begin, end), "torn KV"
        return True

    def has_read(self):
        return True

    def problem(self, state, tokens):
        return None

    def take(self, state, tokens):
        self.move.world.taken += 1
        self.move.world.slots.give_back(self.move.slot)

    def drop(self):
        slots, now = self.move.world.slots, self.move.world.now
        if self.why == "cancelled":
            slots.give_back(self.move.slot)
        else:
            slots.doubt(self.move.slot, self.migration, self.move.sender, now, dead=False)

    def revoke(self):
        pass


class Move:
    """One move of an endless request. writing: the piece whose write has begun and is not over."""

    def __init__(self, world, sender, name):
        self.world, self.sender, self.name = world, sender, name
        self.source = Source(migration=name, rid="r", terms=Terms(), reserve=10_000)
        self.target = self.slot = self.at = self.writing = None
        self.kv = 100

    def granted(self, slot):
        self.slot = slot
        self.target = Target(
            migration=self.name,
            rid="r",
            terms=Terms(),
            tokens=10_000,
            heard=self.world.now,
            move=self,
        )


class World:
    """A target with a few slots, and sources that may stop in the middle of a write."""

    def __init__(self):
        self.now, self.slots = 0.0, ReceiveSlots(COUNT)
        self.memory, self.migrations, self.taken = {}, {}, 0
        self.stopped, self.lose = set(), False
        self.inbox = {who: [] for who in range(-1, SENDERS)}

    def say(self, to, sender, messages):
        if not self.lose:
            self.inbox[to] += [(sender, message) for message in messages]

    def hear_source(self, sender):
        while self.inbox[sender]:
            _, message = self.inbox[sender].pop(0)
            migration = self.migrations[message.migration]
            known = migration.source.state not in OVER
            if known and isinstance(message, ReserveGranted):
                migration.at = message.offset
            said = migration.source.hear(message, self.now) if known else []
            if not known and isinstance(message, Query):
                said = [MigrationCancelled(message.migration)]
            self.say(-1, sender, said)

    def hear_target(self):
        while self.inbox[-1]:
            sender, message = self.inbox[-1].pop(0)
            migration = self.migrations[message.migration]
            if isinstance(message, ReserveRequest):
                if self.slots.free:
                    migration.granted(self.slots.take())
                    there = ReserveGranted(message.migration, ["here"], migration.slot, PIECE)
                    self.say(sender, -1, [there])
                continue
            if isinstance(message, MigrationCancelled):
                self.slots.confirmed(message.migration, sender)
            if migration.target is not None:
                self.say(sender, -1, migration.target.hear(message, self.now))

    def pass_of_source(self, sender):
        """One pass, up to the middle of a write if there is one; the next pass ends it first."""
        for migration in [m for m in self.migrations.values() if m.sender == sender]:
            if migration.writing is not None:
                self.end_write(migration)
        self.hear_source(sender)
        for migration in [m for m in self.migrations.values() if m.sender == sender]:
            if migration.source.state in OVER:
                continue
            migration.kv += migration.source.state is SourceState.COPYING
            for message in migration.source.copy(migration.kv, still=True):
                if isinstance(message, KVChunk | Handover):
                    migration.writing = message
                else:
                    self.say(-1, sender, [message])
            if migration.writing is None:
                self.say(-1, sender, migration.source.tick(self.now))

    def end_write(self, migration):
        """Bytes land where the move was told to write, however long ago that was."""
        message, migration.writing = migration.writing, None
        end = message.kv_tokens if isinstance(message, Handover) else message.end
        if message.begin < end:
            holder = self.memory_holder(migration.at)
            assert holder in (None, migration.name), (
                f"{migration.name} writes into the slot of {holder}"
            )
            window = 0 if isinstance(message, Handover) else migration.source.pieces - 1
            self.memory[migration.at, window % WINDOWS] = (migration.name, message.begin, end)
        said = [message] if isinstance(message, Handover) else migration.source.written(self.now)
        self.say(-1, migration.sender, said)

    def memory_holder(self, slot):
        """The move that the slot is given to now."""
        for migration in self.migrations.values():
            receiving = migration.target is not None and migration.target.state.value == "receiving"
            if receiving and migration.slot == slot:
                return migration.name
        return None

    def pass_of_target(self):
        self.hear_target()
        for migration in self.migrations.values():
            if migration.target is not None:
                self.say(migration.sender, -1, migration.target.tick(self.now))
        for sender, name in self.slots.tick(self.now):
            self.say(sender, -1, [Query(name)])

    def pass_of_all(self):
        self.now += 0.02
        for sender in set(range(SENDERS)) - self.stopped:
            self.pass_of_source(sender)
        if -1 not in self.stopped:
            self.pass_of_target()

    def start(self, sender):
        migration = Move(self, sender, f"{sender}-{len(self.migrations)}")
        self.migrations[migration.name] = migration
        self.say(-1, sender, migration.source.begin(self.now, "layout"))


def played(seed):
    """A world in which this happened at random: moves start, processes stop for a while, sources in
    the middle of a write, time passes, messages are lost."""
    dice, world = random.Random(seed), World()
    until = {}
    for step in range(200):
        what = dice.choices(("start", "pass", "stop", "time", "lose"), WEIGHTS)[0]
        world.stopped = {who for who, last in until.items() if step <= last}
        if what == "start" and (ready := set(range(SENDERS)) - world.stopped):
            world.start(dice.choice(sorted(ready)))
        elif what == "stop":
            writing = [m.sender for m in world.migrations.values() if m.writing is not None]
            until[dice.choice([-1, *writing])] = step + dice.randint(1, 30)
        elif what == "time":
            world.now += dice.choice((0.5, 3.0, 20.0))
        elif what == "lose":
            world.lose = dice.random() < 0.3
        world.pass_of_all()
    world.stopped, world.lose = set(), False
    for _ in range(60):
        world.now += 3.0
        world.pass_of_all()
    assert (world.slots.free, world.slots.in_doubt) == (COUNT, 0), "a slot is lost"
    return world


def test_nobody_writes_into_the_slot_of_another():
    assert sum(played(seed).taken for seed in range(60)) > 90


def test_a_source_stopped_inside_a_write_keeps_its_slot():
    world = World()
    world.start(0)
    while not any(migration.writing for migration in world.migrations.values()):
        world.pass_of_all()
    world.stopped = {0}
    for _ in range(3):
        world.now += 1000.0
        world.start(1)
        for _ in range(60):
            world.pass_of_all()
    assert world.taken == 3, "the other slots go from move to move all the while"
    assert (world.slots.free, world.slots.in_doubt) == (COUNT - 1, 1)
    world.stopped = set()
    for _ in range(3):
        world.pass_of_all()
    assert (world.slots.free, world.slots.in_doubt) == (COUNT, 0)
