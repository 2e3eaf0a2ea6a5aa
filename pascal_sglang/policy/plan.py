"""The plan of one pass: who starts, who is paused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.order import Moment, Order, Rank, Tuning

# Tokens every running request may grow by before the next plan can react: a pause under overlap
# scheduling takes two passes to free memory.
GROWTH = 4


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

    def plan(
        self,
        running: Iterable[Member],
        others: Iterable[Member],
        room: Room,
        moment: Moment,
        joining: int = 0,
    ) -> Plan:
        """Decide a pass.

        running: requests that decode. others: waiting and paused ones. joining: how many more come
        out of a prefill in this pass and cannot be paused yet. Nobody is paused unless the decode
        step would run out of memory or somebody of strictly lower rank starts with what it gives
        back; nobody is started beyond memory and slots.
        """
        active = list(running)
        for member in active:
            self._settle(member)
        budget = room.free_tokens + room.releasing_tokens - GROWTH * (len(active) + joining)
        slots = room.slots
        newcomers = self._sorted(others, moment)
        if budget >= 0 and not newcomers:
            return NOTHING
        victims = self._victims(active, moment)
        pause: list[Member] = []
        while budget < 0 and len(active) - len(pause) > 1 and victims:
            _, victim = victims.pop()
            pause.append(victim)
            budget += victim.kv_tokens + GROWTH
            slots += 1
        start: list[Member] = []
        for rank, member in newcomers:
            need = member.kv_tokens + GROWTH
            displaced = self._displace(victims, rank, need - budget, 1 - slots)
            if displaced is None:
                if not active and not joining and not start:
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

    def started(self, member: Member, moment: Moment) -> None:
        """Take note that a request of the plan really started; it keeps what waiting earned it."""
        rank = self.order.rank(member, moment, self.tuning)[1]
        member.enter(Place.RUNNING, moment.pass_no)
        member.credit += self.order.rank(member, moment, self.tuning)[1] - rank

    def _settle(self, member: Member) -> None:
        """Credit for waiting lasts one quantum of running."""
        if member.credit and member.total_tokens - member.ran_from >= self.tuning.quantum:
            member.credit = 0

    def _sorted(self, members: Iterable[Member], moment: Moment) -> list[tuple[Rank, Member]]:
        ranked = [
            (self.order.rank(m, moment, self.tuning), self.order.tie(m, moment), m.seq, m)
            for m in members
        ]
        ranked.sort(key=lambda entry: entry[:3])
        return [(rank, member) for rank, _, _, member in ranked]

    def _victims(self, active: list[Member], moment: Moment) -> list[tuple[Rank, Member]]:
        """Running requests that may be paused, the worst last."""
        return self._sorted((m for m in active if m.pausable), moment)

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
