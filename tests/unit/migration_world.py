"""Two sides of a move with a network in between that a test may disturb."""

from dataclasses import dataclass, field
from typing import Any

from pascal_sglang.cluster.messages import Handover, KVChunk, ReserveGranted, ReserveRequest
from pascal_sglang.cluster.migration_source import WINDOWS, MigrationSource, Terms
from pascal_sglang.cluster.migration_target import MigrationTarget, TargetState

SLOT_TOKENS = 40
# Tokens that a sliding window sees.
WINDOW = 25
# The place in a slot of what is left when a request has stopped.
LAST = "last"


def terms(**more):
    return Terms(**{"tail": 5, "patience_s": 2.0, "repeat_s": 0.25, **more})


TERMS = terms()


@dataclass(kw_only=True, slots=True, eq=False)
class Source(MigrationSource):
    """A source whose request decodes in a world."""

    world: Any

    def stop(self):
        assert self.world.running
        self.world.running = False
        self.world.events.append("stop")

    def learn(self):
        assert self.world.running

    def snapshot(self):
        assert not self.world.running
        return b"%d" % self.world.kv

    def resume(self):
        assert not self.world.running
        self.world.running = True
        self.world.events.append("resume")

    def release(self):
        assert not self.world.running
        self.world.events.append("release")

    def lose(self):
        assert not self.world.running
        self.world.events.append("lose")


@dataclass(kw_only=True, slots=True, eq=False)
class Target(MigrationTarget):
    """A target whose memory is in a world. wrong: what is wrong with every state. unreadable:
    nothing can be read from the slot. fails: the request cannot be taken over. fetched: pieces so
    far; busy: windows that are being read."""

    world: Any
    wrong: str | None = None
    unreadable: bool = False
    fails: bool = False
    fetched: int = 0
    busy: list = field(default_factory=list)

    def fetch(self, begin, end, before, *, stopped):
        if self.unreadable:
            return False
        window = LAST if stopped else self.fetched % WINDOWS
        assert (begin, end, before) == self.world.slot[window], "the slot holds something else"
        self.world.received = end
        self.world.windows |= set(range(max(begin, before), end))
        if not stopped:
            self.fetched += 1
            self.busy.append(window)
        return True

    def has_read(self):
        if self.world.reads_late:
            return None
        self.busy.pop(0)
        return True

    def problem(self, state, tokens):
        return self.wrong

    def take(self, state, tokens):
        assert self.world.received == tokens == int(state), "a hole in the KV"
        seen = set(range(self.before, tokens))
        assert seen <= self.world.windows, "a hole in the windows"
        assert self.before == before_of(tokens), "windows that nobody sees, or too few"
        if self.fails:
            self.world.events.append("drop")
            return False
        self.world.taken = state
        self.world.events.append("take")
        return True

    def drop(self):
        self.world.events.append("drop")

    def revoke(self):
        self.world.events.append("revoke")


def before_of(kv_tokens):
    """How many of so many tokens have left the window of the next one."""
    return max(0, kv_tokens - WINDOW)


class World:
    """Two sides of a move and everything they own, with the network in between.

    Each window of the slot holds what was written last; a target that reads anything else than it
    asked for has corrupted KV, and a source that writes where it reads corrupts it. writes_late,
    reads_late: copies are not complete yet.
    """

    def __init__(self, terms=TERMS, kv=100, limit=160, *, waits=False):
        """waits: for its prefill, and so it has no KV."""
        if waits:
            kv = limit = 0
        self.now, self.kv, self.limit, self.waits = 0.0, kv, limit, waits
        self.running, self.events, self.taken = True, [], None
        # Tokens whose KV has come, and those of them with entries of windows.
        self.slot, self.received, self.windows = {}, 0, set()
        self.writes_late = self.reads_late = False
        self.source = Source(migration="m1", rid="r", terms=terms, reserve=limit, world=self)
        before = before_of(kv)
        self.target = Target(
            migration="m1", rid="r", terms=terms, tokens=limit, before=before, world=self
        )
        self.asked = False
        # Sides that do nothing until they are continued, and what has come for them meanwhile.
        self.stopped, self.inbox = set(), {"source": [], "target": []}
        self.to_target, self.to_source = [], []
        self.to_target += self.source.begin(self.now, "layout", before)

    def deliver_to_target(self, at):
        self.inbox["target"].append(self.to_target[at])
        self.read()

    def deliver_to_source(self, at):
        self.inbox["source"].append(self.to_source[at])
        self.read()

    def read(self):
        """Each side that is not stopped hears what has come."""
        for side, hear in (("source", self.hear_source), ("target", self.hear_target)):
            while self.inbox[side] and side not in self.stopped:
                hear(self.inbox[side].pop(0))

    def hear_source(self, message):
        self.to_target += self.source.hear(message, self.now)

    def hear_target(self, message):
        if not self.asked:
            # Only an Ask reserves; before it the move is unknown here.
            if isinstance(message, ReserveRequest):
                self.asked = True
                self.target.heard = self.now
                self.to_source.append(ReserveGranted("m1", ["here"], 0, SLOT_TOKENS))
        elif not isinstance(message, ReserveRequest):
            self.to_source += self.target.hear(message, self.now)

    def step(self):
        """A pass on both sides that are not stopped."""
        self.read()
        if "source" not in self.stopped:
            self._step_source()
        if "target" not in self.stopped and self.asked:
            self.to_source += self.target.tick(self.now)

    def _step_source(self):
        if self.running and not self.waits:
            self.kv = min(self.limit - 1, self.kv + 1)
        before = before_of(self.kv)
        still = not self.running
        if not self.writes_late:
            self.to_target += self.source.written(self.now)
        for message in self.source.copy(self.kv, still=still, before=before):
            if isinstance(message, KVChunk):
                self.write((self.source.pieces - 1) % WINDOWS, message, message.end)
            elif isinstance(message, Handover):
                self.write(LAST, message, message.kv_tokens)
            else:
                self.to_target.append(message)
        if not self.writes_late:
            self.to_target += self.source.written(self.now)
        self.to_target += self.source.tick(self.now)

    def write(self, window, piece, end):
        busy = self.target.busy if self.target.state is TargetState.RECEIVING else ()
        assert not busy if window == LAST else window not in busy, "it is being read"
        self.slot[window] = (piece.begin, end, piece.before)

    def check(self):
        here = self.running
        there = self.target.state is TargetState.OWNED
        assert not (here and there), "two owners"
        if "release" in self.events or "lose" in self.events:
            assert not here
        for once in ("release", "lose", "take", "drop", "revoke"):
            assert self.events.count(once) <= 1
        if "release" in self.events:
            assert there, "nobody has it"
        return here, there

    def settle(self):
        """From now on nobody is stopped and nothing is lost: the move comes to an end."""
        self.stopped, self.writes_late, self.reads_late = set(), False, False
        for number in range(100):
            self.now += 0.2 if number < 80 else 10.0
            self.step()
            while self.to_target or self.to_source:
                if self.to_target:
                    self.deliver_to_target(0)
                    self.to_target.pop(0)
                if self.to_source:
                    self.deliver_to_source(0)
                    self.to_source.pop(0)
                self.check()
