"""The plan of one pass: who starts, who is paused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pascal_sglang.policy.line import Line
from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.order import Moment, Order, Rank, Tuning, credit_of

# Tokens every running request may grow by before the next plan can react: a pause under overlap
# scheduling takes two passes to free memory.
GROWTH = 4

# Passes before displacement is tried again for a request for whom it has just failed.
PATIENCE = 4


@dataclass(frozen=True, slots=True)
class Room:
    """What there is to give: KV tokens free or evictable, tokens that pauses under way will free,
    and request slots."""

    free_tokens: int
    releasing_tokens: int
    slots: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`start`: waiting or paused requests in the order to start them. `pause`: running requests to
    pause, worst first."""

    start: tuple[Member, ...] = ()
    pause: tuple[Member, ...] = ()


NOTHING = Plan()


class Planner:
    """Turns a view of the requests into one deterministic decision."""

    def __init__(self, order: Order, tuning: Tuning) -> None:
        self.order = order
        self.tuning = tuning
        self.line = Line(order, tuning)
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
        if budget >= 0 and not self.line:
            return NOTHING
        slots = room.slots
        victims: list[tuple[Rank, Member]] | None = None
        pause: list[Member] = []
        if budget < 0:
            victims = self._victims(running, moment)
            while budget < 0 and len(running) - len(pause) > 1 and victims:
                _, victim = victims.pop()
                pause.append(victim)
                budget += victim.kv_tokens + GROWTH
                slots += 1
        start: list[Member] = []
        for member in self.line.best_first(moment):
            need = member.kv_tokens + GROWTH
            if need > budget or slots < 1:
                if self._stays_blocked(member, moment):
                    break
                if victims is None:
                    victims = self._victims(running, moment)
                rank = self.order.rank(member, moment, self.tuning)
                displaced = self._displace(victims, rank, need - budget, 1 - slots)
                if displaced is None:
                    self._blocked = member
                    self._look_again = moment.pass_no + PATIENCE
                    if not running and not joining and not start:
                        start.append(member)  # An idle instance: let the engine try, or refuse it.
                    break
                for victim in displaced:
                    pause.append(victim)
                    budget += victim.kv_tokens + GROWTH
                    slots += 1
            budget -= need
            slots -= 1
            start.append(member)
        return Plan(tuple(start), tuple(pause))

    def _stays_blocked(self, member: Member, moment: Moment) -> bool:
        """Whether looking for somebody to displace was just in vain for this very request; who runs
        changes rank but once in many passes, so that is not tried in every one."""
        return member is self._blocked and moment.pass_no < self._look_again

    def started(self, member: Member, moment: Moment) -> None:
        """Take note that a request of the plan really started; it keeps what waiting earned it."""
        self.line.remove(member)
        rank = self.order.rank(member, moment, self.tuning)[1]
        member.enter(Place.RUNNING, moment.pass_no)
        member.credit += self.order.rank(member, moment, self.tuning)[1] - rank

    def stopped(self, member: Member, place: Place, moment: Moment) -> None:
        """Take note that a request waits or is paused from now on."""
        member.credit = credit_of(member, self.tuning)
        member.enter(place, moment.pass_no)
        self.line.add(member)

    def _victims(self, running: Sequence[Member], moment: Moment) -> list[tuple[Rank, Member]]:
        """Running requests that may be paused, the worst last."""
        ranked = [
            (self.order.rank(m, moment, self.tuning), self.order.key(m, self.tuning), m.seq, m)
            for m in running
            if m.pausable
        ]
        ranked.sort(key=lambda entry: entry[:3])
        return [(rank, member) for rank, _, _, member in ranked]

    @staticmethod
    def _displace(
        victims: list[tuple[Rank, Member]], rank: Rank, tokens: int, slots: int
    ) -> list[Member] | None:
        """Take from the end of `victims` as many as give back `tokens` and `slots`; None, and
        nobody taken, if those of strictly worse rank do not suffice."""
        taken: list[Member] = []
        at = len(victims)
        while tokens > 0 or slots > 0:
            at -= 1
            if at < 0 or victims[at][0] <= rank:
                return None
            victim = victims[at][1]
            taken.append(victim)
            tokens -= victim.kv_tokens + GROWTH
            slots -= 1
        del victims[at:]
        return taken
