"""One pass in the making: what is left to give, and who gives way to whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pascal_sglang.policy.ranking import Moment, Rank
from pascal_sglang.policy.request import Member

if TYPE_CHECKING:
    from pascal_sglang.policy.plan import Planner

# Tokens every running request may grow by before the next plan can react: a pause under overlap
# scheduling takes two passes to free memory.
GROWTH = 4


class Making:
    """A plan in the making: what is left to give, and who gives way."""

    def __init__(
        self,
        planner: Planner,
        running: Sequence[Member],
        moment: Moment,
        budget: int,
        slots: int,
    ) -> None:
        self.planner = planner
        self.running = running
        self.moment = moment
        self.budget = budget
        self.slots = slots
        self.paused: list[Member] = []
        self.parked: list[Member] = []
        self.spilled: dict[Member, int] = {}
        self.starting: set[Member] = set()
        self.lacks = "memory"
        self._parked: list[Member] | None = None
        self._gave: dict[Member, int] = {}

    def let_grow(self, *, whatever: bool = False) -> None:
        """Make the next decode steps fit: the worst give way, and of equals those who do not run,
        for that costs nobody a step. The last who runs never gives way here, and before the line
        has been served nobody better than it does (`whatever`: afterwards they do)."""
        if self.budget >= 0:
            return
        planner, moment = self.planner, self.moment
        parked = [
            m
            for m in planner.parked_worst_first(moment)[::-1]
            if m not in self.spilled and m not in self.starting
        ]
        victims = [*planner.victims.worst_first(self.running, moment)][::-1]
        running = [m for m in victims if m not in self._gave]

        def rank(member: Member) -> Rank:
            return planner.order.rank(member, moment, planner.tuning)

        while self.budget < 0:
            runs_worse = bool(parked and running) and rank(running[-1]) > rank(parked[-1])
            if running and len(self.running) - len(self.paused) > 1 and (runs_worse or not parked):
                self._pause(running.pop())
            elif parked and (whatever or not runs_worse):
                self._spill(parked.pop())
            else:
                return

    def room_for(self, member: Member, need: int) -> bool:
        """Make room for one who starts, by those of strictly worse rank alone; if they do not
        suffice nobody gives way."""
        planner = self.planner
        tokens, slots = need - self.budget, 1 - self.slots
        self.lacks = "slots" if slots > 0 else "memory"
        spills = self._spills(tokens, besides=member)
        tokens -= sum(planner.worth.gives(m) for m in spills)
        if tokens > 0 or slots > 0:
            if planner.stays_blocked(member, self.moment):
                return False
            rank = planner.order.rank(member, self.moment, planner.tuning)
            victims = self._displaced(rank, tokens, slots)
            if victims is None:
                planner.gave_up_on(member, self.moment)
                return False
            for victim in victims:
                self._pause(victim)
        for spill in spills:
            self._spill(spill)
        return True

    def keep_what_nobody_needs(self) -> None:
        """KV whose memory is not wanted after all stays on the device, best first."""
        for victim in reversed(self.paused):
            if self._gave[victim] <= self.budget:
                self.budget -= self._gave[victim]
                self.parked.append(victim)
        for member in reversed(list(self.spilled)):
            if self.spilled[member] <= self.budget:
                self.budget -= self.spilled.pop(member)

    def _spills(self, tokens: int, besides: Member | None = None) -> list[Member]:
        """The fewest parked requests, worst first, that give back `tokens`, or all of them."""
        if tokens <= 0 or not self.planner.parked:
            return []
        if self._parked is None:
            self._parked = self.planner.parked_worst_first(self.moment)
        chosen: list[Member] = []
        for member in self._parked:
            if tokens <= 0:
                break
            if member is besides or member in self.starting or member in self.spilled:
                continue
            chosen.append(member)
            tokens -= self.planner.worth.gives(member)
        return chosen

    def _displaced(self, rank: Rank, tokens: int, slots: int) -> list[Member] | None:
        """Who gives way to `rank`: as many as give back `tokens` and `slots`; None if those of
        strictly worse rank do not suffice."""
        planner = self.planner
        if planner.order.worst is not None and rank >= planner.order.worst:
            self.lacks = "rank"
            return None
        for fresh in (False, True):
            if fresh and planner.victims.is_fresh(self.moment):
                break
            taken: list[Member] = []
            left, lacking = tokens, slots
            for victim in planner.victims.worst_first(self.running, self.moment, fresh=fresh):
                if victim in self._gave:
                    continue
                if planner.order.rank(victim, self.moment, planner.tuning) <= rank:
                    self.lacks = "rank"
                    break
                taken.append(victim)
                left -= planner.worth.gives(victim) + GROWTH
                lacking -= 1
                if left <= 0 and lacking <= 0:
                    return taken
        return None

    def _pause(self, victim: Member) -> None:
        given = self.planner.worth.gives(victim)
        self._gave[victim] = given
        self.paused.append(victim)
        self.budget += given + GROWTH
        self.slots += 1

    def _spill(self, member: Member) -> None:
        given = self.planner.worth.gives(member)
        self.spilled[member] = given
        self.budget += given
