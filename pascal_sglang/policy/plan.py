"""The plan of one pass: who starts, who is paused, whose KV has to leave the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.victims import Victims

# Tokens every running request may grow by before the next plan can react: a pause under overlap
# scheduling takes two passes to free memory.
GROWTH = 4
# Passes before displacement is tried again for a request for whom it has just failed. Those who run
# change rank but once in many passes, and looking at all of them costs.
PATIENCE = 16


@dataclass(frozen=True, slots=True)
class Capacity:
    """What there is to give: KV tokens free or evictable, tokens that pauses under way will free,
    and request slots."""

    free_tokens: int
    releasing_tokens: int
    slots: int


@dataclass(frozen=True, slots=True)
class KVAccounting:
    """KV tokens a start takes and a pause gives back. The engine knows about shared prefixes."""

    required: Callable[[RequestState], int] = lambda m: (
        0 if m.status is RequestStatus.RESIDENT else m.kv_tokens
    )
    reclaimable: Callable[[RequestState], int] = lambda m: m.kv_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision.

    start: waiting or paused requests in the order to start them.
    pause: running requests to pause, worst first; `park` says which of them keep their KV on the
    device because nobody needs its memory yet.
    spill: requests paused with their KV on the device that have to give it up now.
    blocked, shortage: the best request that could not start, and what it lacked: `memory`, `slots`,
    or `rank` where others could give way but are not worse.
    """

    start: tuple[RequestState, ...] = ()
    pause: tuple[RequestState, ...] = ()
    park: frozenset[RequestState] = frozenset()
    spill: tuple[RequestState, ...] = ()
    blocked: RequestState | None = None
    shortage: str = ""


NOTHING = Plan()
SHORTAGES = ("memory", "slots", "rank")


class Planner:
    """Turns a view of the requests into one deterministic decision."""

    def __init__(
        self, policy: Policy, tuning: Tuning, accounting: KVAccounting | None = None
    ) -> None:
        self.policy = policy
        self.tuning = tuning
        self.accounting = accounting or KVAccounting()
        self.queue = WaitQueue(policy, tuning)
        self.victims = Victims(policy, tuning)
        self._blocked: RequestState | None = None
        self._look_again = 0

    def plan(
        self,
        running: Sequence[RequestState],
        capacity: Capacity,
        pass_info: PassInfo,
        joining: int = 0,
    ) -> Plan:
        """Decide a pass for those in `queue` and those who run.

        running: requests that decode. joining: how many more come out of a prefill in this pass and
        cannot be paused yet. Nobody is paused unless the decode step would run out of memory or
        somebody of strictly lower rank starts with what it gives back; nobody is started beyond
        memory and slots.
        """
        budget = (
            capacity.free_tokens + capacity.releasing_tokens - GROWTH * (len(running) + joining)
        )
        if self.is_content(budget):
            return NOTHING
        builder = PlanBuilder(self, running, pass_info, budget, capacity.slots)
        builder.free_for_decode()
        start: list[RequestState] = []
        blocked: RequestState | None = None
        for request in self.queue.best_first(pass_info):
            if request in builder.spilled:
                blocked = request  # It has just given way; nobody behind it goes first.
                break
            need = self.accounting.required(request) + self._headroom(request)
            if (need > builder.budget or builder.slots < 1) and not builder.make_room_for(
                request, need
            ):
                if not running and not joining and not start:
                    start.append(request)  # An idle instance: let the engine try, or refuse it.
                blocked = request
                break
            builder.budget -= need
            builder.slots -= 1
            builder.starting.add(request)
            start.append(request)
        builder.free_for_decode(allow_better=True)
        builder.park_what_fits()
        return Plan(
            tuple(start),
            tuple(builder.paused),
            frozenset(builder.parked),
            tuple(builder.spilled),
            blocked,
            "" if blocked is None else builder.shortage,
        )

    def is_content(self, spare_tokens: int) -> bool:
        """Whether there is nothing to decide: nobody waits, and with `spare_tokens` left after the
        next steps nobody has to give way."""
        return spare_tokens >= 0 and not self.queue

    def _headroom(self, request: RequestState) -> int:
        return max(GROWTH, min(self.tuning.headroom, request.remaining))

    def stays_blocked(self, request: RequestState, pass_info: PassInfo) -> bool:
        return request is self._blocked and pass_info.pass_no < self._look_again

    def gave_up_on(self, request: RequestState, pass_info: PassInfo) -> None:
        self._blocked = request
        self._look_again = pass_info.pass_no + PATIENCE


class PlanBuilder:
    """A plan in the making: what is left to give, and who gives way."""

    def __init__(
        self,
        planner: Planner,
        running: Sequence[RequestState],
        pass_info: PassInfo,
        budget: int,
        slots: int,
    ) -> None:
        self.planner = planner
        self.running = running
        self.pass_info = pass_info
        self.budget = budget
        self.slots = slots
        self.paused: list[RequestState] = []
        self.parked: list[RequestState] = []
        self.spilled: dict[RequestState, int] = {}
        self.starting: set[RequestState] = set()
        self.shortage = "memory"
        self._parked: list[RequestState] | None = None
        self._gave: dict[RequestState, int] = {}

    def free_for_decode(self, *, allow_better: bool = False) -> None:
        """Make the next decode steps fit: the worst give way, and of equals those who do not run,
        for that costs nobody a step. The last who runs never gives way here, and before the line
        has been served nobody better than it does (`allow_better`: afterwards they do)."""
        if self.budget >= 0:
            return
        planner, pass_info = self.planner, self.pass_info
        parked = [
            m
            for m in planner.queue.resident_worst_first(pass_info)[::-1]
            if m not in self.spilled and m not in self.starting
        ]
        victims = [*planner.victims.worst_first(self.running, pass_info)][::-1]
        running = [m for m in victims if m not in self._gave]

        def rank(request: RequestState) -> Rank:
            return planner.policy.rank(request, pass_info, planner.tuning)

        while self.budget < 0:
            runs_worse = bool(parked and running) and rank(running[-1]) > rank(parked[-1])
            if running and len(self.running) - len(self.paused) > 1 and (runs_worse or not parked):
                self._pause(running.pop())
            elif parked and (allow_better or not runs_worse):
                self._spill(parked.pop())
            else:
                return

    def make_room_for(self, request: RequestState, need: int) -> bool:
        """Make room for one who starts, by those of strictly worse rank alone; if they do not
        suffice nobody gives way."""
        planner = self.planner
        tokens, slots = need - self.budget, 1 - self.slots
        self.shortage = "slots" if slots > 0 else "memory"
        spills = self._spills(tokens, besides=request)
        tokens -= sum(planner.accounting.reclaimable(m) for m in spills)
        if tokens > 0 or slots > 0:
            if planner.stays_blocked(request, self.pass_info):
                return False
            rank = planner.policy.rank(request, self.pass_info, planner.tuning)
            victims = self._displaced(rank, tokens, slots)
            if victims is None:
                planner.gave_up_on(request, self.pass_info)
                return False
            for victim in victims:
                self._pause(victim)
        for spill in spills:
            self._spill(spill)
        return True

    def park_what_fits(self) -> None:
        """KV whose memory is not wanted after all stays on the device, best first."""
        for victim in reversed(self.paused):
            if self._gave[victim] <= self.budget:
                self.budget -= self._gave[victim]
                self.parked.append(victim)
        for request in reversed(list(self.spilled)):
            if self.spilled[request] <= self.budget:
                self.budget -= self.spilled.pop(request)

    def _spills(self, tokens: int, besides: RequestState | None = None) -> list[RequestState]:
        """The fewest parked requests, worst first, that give back `tokens`, or all of them."""
        if tokens <= 0 or not self.planner.queue.resident:
            return []
        if self._parked is None:
            self._parked = self.planner.queue.resident_worst_first(self.pass_info)
        chosen: list[RequestState] = []
        for request in self._parked:
            if tokens <= 0:
                break
            if request is besides or request in self.starting or request in self.spilled:
                continue
            chosen.append(request)
            tokens -= self.planner.accounting.reclaimable(request)
        return chosen

    def _displaced(self, rank: Rank, tokens: int, slots: int) -> list[RequestState] | None:
        """Who gives way to `rank`: as many as give back `tokens` and `slots`; None if those of
        strictly worse rank do not suffice."""
        planner = self.planner
        if planner.policy.worst is not None and rank >= planner.policy.worst:
            self.shortage = "rank"
            return None
        for fresh in (False, True):
            if fresh and planner.victims.is_fresh(self.pass_info):
                break
            taken: list[RequestState] = []
            left, lacking = tokens, slots
            for victim in planner.victims.worst_first(self.running, self.pass_info, fresh=fresh):
                if victim in self._gave:
                    continue
                if planner.policy.rank(victim, self.pass_info, planner.tuning) <= rank:
                    self.shortage = "rank"
                    break
                taken.append(victim)
                left -= planner.accounting.reclaimable(victim) + GROWTH
                lacking -= 1
                if left <= 0 and lacking <= 0:
                    return taken
        return None

    def _pause(self, victim: RequestState) -> None:
        given = self.planner.accounting.reclaimable(victim)
        self._gave[victim] = given
        self.paused.append(victim)
        self.budget += given + GROWTH
        self.slots += 1

    def _spill(self, request: RequestState) -> None:
        given = self.planner.accounting.reclaimable(request)
        self.spilled[request] = given
        self.budget += given
