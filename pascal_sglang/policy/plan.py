"""The plan of one pass: who starts, who is paused, whose KV has to leave the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pascal_sglang.policy.making import GROWTH, Making
from pascal_sglang.policy.queue import Line
from pascal_sglang.policy.ranking import Moment, Order, Rank, Tuning, credit_of
from pascal_sglang.policy.request import Member, Place
from pascal_sglang.policy.victims import Victims

# Passes before displacement is tried again for a request for whom it has just failed. Those who run
# change rank but once in many passes, and looking at all of them costs.
PATIENCE = 16


@dataclass(frozen=True, slots=True)
class Room:
    """What there is to give: KV tokens free or evictable, tokens that pauses under way will free,
    and request slots."""

    free_tokens: int
    releasing_tokens: int
    slots: int


@dataclass(frozen=True, slots=True)
class Worth:
    """KV tokens a start takes and a pause gives back. The engine knows about shared prefixes."""

    needs: Callable[[Member], int] = lambda m: 0 if m.place is Place.RESIDENT else m.kv_tokens
    gives: Callable[[Member], int] = lambda m: m.kv_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision.

    start: waiting or paused requests in the order to start them.
    pause: running requests to pause, worst first; `park` says which of them keep their KV on the
    device because nobody needs its memory yet.
    spill: requests paused with their KV on the device that have to give it up now.
    blocked, lacks: the best request that could not start, and what it lacked: `memory`, `slots`,
    or `rank` where others could give way but are not worse.
    """

    start: tuple[Member, ...] = ()
    pause: tuple[Member, ...] = ()
    park: frozenset[Member] = frozenset()
    spill: tuple[Member, ...] = ()
    blocked: Member | None = None
    lacks: str = ""


NOTHING = Plan()
LACKS = ("memory", "slots", "rank")


class Planner:
    """Turns a view of the requests into one deterministic decision."""

    def __init__(self, order: Order, tuning: Tuning, worth: Worth | None = None) -> None:
        self.order = order
        self.tuning = tuning
        self.worth = worth or Worth()
        self.line = Line(order, tuning)
        self.victims = Victims(order, tuning)
        self.parked: dict[Member, None] = {}
        self._blocked: Member | None = None
        self._look_again = 0

    def plan(self, running: Sequence[Member], room: Room, moment: Moment, joining: int = 0) -> Plan:
        """Decide a pass for those in `line` and those who run.

        running: requests that decode. joining: how many more come out of a prefill in this pass and
        cannot be paused yet. Nobody is paused unless the decode step would run out of memory or
        somebody of strictly lower rank starts with what it gives back; nobody is started beyond
        memory and slots.
        """
        budget = room.free_tokens + room.releasing_tokens - GROWTH * (len(running) + joining)
        if self.is_content(budget):
            return NOTHING
        made = Making(self, running, moment, budget, room.slots)
        made.let_grow()
        start: list[Member] = []
        blocked: Member | None = None
        for member in self.line.best_first(moment):
            if member in made.spilled:
                blocked = member  # It has just given way; nobody behind it goes first.
                break
            need = self.worth.needs(member) + self._headroom(member)
            if (need > made.budget or made.slots < 1) and not made.room_for(member, need):
                if not running and not joining and not start:
                    start.append(member)  # An idle instance: let the engine try, or refuse it.
                blocked = member
                break
            made.budget -= need
            made.slots -= 1
            made.starting.add(member)
            start.append(member)
        made.let_grow(whatever=True)
        made.keep_what_nobody_needs()
        return Plan(
            tuple(start),
            tuple(made.paused),
            frozenset(made.parked),
            tuple(made.spilled),
            blocked,
            "" if blocked is None else made.lacks,
        )

    def is_content(self, spare_tokens: int) -> bool:
        """Whether there is nothing to decide: nobody waits, and with `spare_tokens` left after the
        next steps nobody has to give way."""
        return spare_tokens >= 0 and not self.line

    def _headroom(self, member: Member) -> int:
        return max(GROWTH, min(self.tuning.headroom, member.remaining))

    def started(self, member: Member, moment: Moment) -> None:
        """Take note that a request of the plan really started; it keeps what waiting earned it."""
        self.left(member)
        rank = self.order.rank(member, moment, self.tuning)[1]
        member.enter(Place.RUNNING, moment.pass_no, moment.now)
        member.credit += self.order.rank(member, moment, self.tuning)[1] - rank

    def stopped(self, member: Member, place: Place, moment: Moment) -> None:
        """Take note that a request waits or is paused from now on."""
        self.left(member)
        member.credit = credit_of(member, self.tuning)
        member.enter(place, moment.pass_no, moment.now)
        self._stands(member)

    def spilled(self, member: Member, place: Place) -> None:
        """Take note that a paused request's KV has left the device; its waiting goes on."""
        self.left(member)
        member.place = place
        self._stands(member)

    def left(self, member: Member) -> None:
        """Take note that a request does not wait any more, for whatever reason."""
        self.line.remove(member)
        self.parked.pop(member, None)

    def recount(self, members: Sequence[Member]) -> None:
        """Make the line anew from those who truly wait."""
        self.line.clear()
        self.parked.clear()
        for member in members:
            self._stands(member)

    def _stands(self, member: Member) -> None:
        self.line.add(member)
        if member.place is Place.RESIDENT:
            self.parked[member] = None

    def best_first(self, members: Iterable[Member], moment: Moment) -> list[Member]:
        """Any members by the one ordering key."""

        def place(member: Member) -> tuple[Rank, float, int]:
            rank = self.order.rank(member, moment, self.tuning)
            return rank, self.order.key(member, self.tuning), member.seq

        return sorted(members, key=place)

    def parked_worst_first(self, moment: Moment) -> list[Member]:
        """Paused requests whose KV is on the device; who would come back last comes first."""
        return self.best_first(self.parked, moment)[::-1]

    def stays_blocked(self, member: Member, moment: Moment) -> bool:
        return member is self._blocked and moment.pass_no < self._look_again

    def gave_up_on(self, member: Member, moment: Moment) -> None:
        self._blocked = member
        self._look_again = moment.pass_no + PATIENCE
