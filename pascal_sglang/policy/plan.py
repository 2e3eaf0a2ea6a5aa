"""The plan of one pass: who starts, who is paused, whose KV has to leave the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.victims import Victims

# Steps of every running request before the next plan can react: a pause under overlap scheduling
# takes two passes to free memory.
GROWTH = 4
# Passes before displacement is tried again for a request for which it has just failed. Running
# requests change rank but once in many passes, and looking at all of them costs.
PATIENCE = 16
# Starts of one pass: planning takes time in which nothing decodes. The others start a pass later.
MOST_STARTS = 64
# Requests behind a blocked first in line that a pass looks at.
BACKFILL_DEPTH = 32
# Recurrent states, or entries of sliding windows, where a model has none.
UNLIMITED = 1 << 60


def room_to_grow(requests: int, step_tokens: int = 1) -> int:
    """KV entries that so many requests may grow by before the next plan can react. step_tokens: the
    most that a step gives each."""
    return GROWTH * step_tokens * requests


@dataclass(frozen=True, slots=True)
class Capacity:
    """What there is to give in a pass."""

    # KV entries that are free or evictable.
    free_tokens: int
    # KV entries that pauses under way will free.
    releasing_tokens: int
    # Request slots.
    slots: int
    # Recurrent states that are free or can be evicted, or that pauses under way will free.
    states: int = UNLIMITED
    # The same of entries in the pool of layers with sliding windows.
    windows: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class KVAccounting:
    """KV entries that a start takes and a pause gives back, and the same of what some models have
    beside them: recurrent states, and entries of sliding windows. The engine knows shared prefixes.
    """

    required: Callable[[RequestState], int] = lambda r: (
        0 if r.status is RequestStatus.RESIDENT else r.kv_tokens
    )
    reclaimable: Callable[[RequestState], int] = lambda r: r.kv_tokens
    states_required: Callable[[RequestState], int] = lambda r: 0
    states_reclaimable: Callable[[RequestState], int] = lambda r: 0
    windows_required: Callable[[RequestState], int] = lambda r: 0
    windows_reclaimable: Callable[[RequestState], int] = lambda r: 0
    # Whether a LoRA adapter that a start takes fits beside those in use.
    adapter_fits: Callable[[RequestState], bool] = lambda r: True

    def required_beside(self, request: RequestState) -> tuple[int, int]:
        """In the order of `BESIDE`."""
        return self.states_required(request), self.windows_required(request)

    def reclaimable_beside(self, request: RequestState) -> tuple[int, int]:
        """In the order of `BESIDE`."""
        return self.states_reclaimable(request), self.windows_reclaimable(request)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision of one pass."""

    # Waiting or paused requests, in the order to start them.
    start: tuple[RequestState, ...] = ()
    # Running requests to pause, worst first.
    pause: tuple[RequestState, ...] = ()
    # Those of `pause` that keep their KV on the device, because its memory is not needed yet.
    park: frozenset[RequestState] = frozenset()
    # Resident requests whose KV has to leave the device now.
    spill: tuple[RequestState, ...] = ()
    # The best request that could not start.
    blocked: RequestState | None = None
    # What that request lacked, one of `SHORTAGES`: `rank` where the requests that could give way
    # are not of worse rank.
    shortage: str = ""


NOTHING = Plan()
# What a request may take beside KV entries and a slot.
BESIDE = ("states", "windows")
# Which of them each running request takes more of with every token.
GROWS_BESIDE = (False, True)
SHORTAGES = ("memory", "slots", *BESIDE, "adapters", "rank")


class Planner:
    """Decides, deterministically, what a pass starts and pauses."""

    def __init__(
        self,
        policy: Policy,
        tuning: Tuning,
        accounting: KVAccounting | None = None,
        step_tokens: int = 1,
    ) -> None:
        """step_tokens: the most tokens that a step gives a request."""
        self.policy = policy
        # KV entries, and what `BESIDE` names, that a running request takes until the next plan can
        # react.
        self.growth = room_to_grow(1, step_tokens)
        self.growth_beside = tuple(self.growth * grows for grows in GROWS_BESIDE)
        self.tuning = tuning
        self.accounting = accounting or KVAccounting()
        self.queue = WaitQueue(policy, tuning)
        self._start_anew()

    def _start_anew(self) -> None:
        """Remember nothing of earlier plans."""
        self.victims = Victims(self.policy, self.tuning)
        # The last request for which displacement failed, its rank then, and the pass from which on
        # to try again for the same request of the same rank.
        self._gave_up: tuple[RequestState, Rank] | None = None
        self._look_again = 0
        # What that request lacked.
        self.lacked = ""
        # The last look at the requests behind a blocked one, if none could start: that one, the
        # first behind it, which an answer that turns urgent becomes, and the state of the queue;
        # and the least budget with which one of them could have started.
        self._seen: tuple[RequestState, RequestState, int] | None = None
        self._least_budget = 0

    def retune(self, policy: Policy, tuning: Tuning) -> None:
        """Go by another policy, or other numbers of it, from the next plan on."""
        self.policy, self.tuning = policy, tuning
        self.queue.retune(policy, tuning)
        self._start_anew()

    def plan(
        self,
        running: Sequence[RequestState],
        capacity: Capacity,
        pass_info: PassInfo,
        joining: int = 0,
    ) -> Plan:
        """Decide a pass.

        running: requests that decode. joining: requests that come out of a prefill in this pass and
        cannot be paused yet. A request is paused only if the decode step would run out of memory,
        or if a request of strictly lower rank that may displace it (`Policy.displaces`) starts with
        what the pause gives back. No request starts beyond memory and slots. The queue is served in
        order, but for `backfill`.
        """
        grown = self.growth * (len(running) + joining)
        budget = capacity.free_tokens + capacity.releasing_tokens - grown
        windows = capacity.windows - grown
        if self.is_content(min(budget, windows)):
            return NOTHING
        beside = (capacity.states, windows)
        builder = PlanBuilder(self, running, pass_info, budget, capacity.slots, beside)
        builder.free_for_decode()
        start: list[RequestState] = []
        blocked: RequestState | None = None
        with closing(self.queue.best_first(pass_info)) as in_line:
            for request in in_line:
                if len(start) == MOST_STARTS:
                    break
                if request in builder.spilled:
                    blocked = request  # It has just given way; no request behind it goes first.
                    break
                need = self.accounting.required(request) + self._headroom(request)
                if not builder.has_room_for(request, need) and not builder.make_room_for(
                    request, need
                ):
                    if not running and not joining and not start:
                        # An idle instance: let the engine try, or refuse it, with all there is.
                        builder.spill_all(besides=request)
                        builder.start(request, need)
                        start.append(request)
                    blocked = request
                    break
                builder.start(request, need)
                start.append(request)
            if blocked is not None and blocked not in start:
                start += self.backfill(blocked, in_line, builder, MOST_STARTS - len(start))
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

    def backfill(
        self,
        blocked: RequestState,
        behind: Generator[RequestState],
        builder: PlanBuilder,
        most: int,
    ) -> list[RequestState]:
        """Start up to `most` requests `behind` a first in line that does not fit, in memory it
        cannot use.

        Each fits with a quantum to grow, so that it does not have to give way at once, and no
        request gives way in the same pass. Once the first in line has waited for
        `Tuning.backfill` quanta-lengths of passes, or goes before urgent answers, it is served
        before all others.
        """
        waited = builder.pass_info.pass_no - blocked.since_pass
        if not self.policy.backfills or waited >= self.tuning.backfill * self.tuning.quantum:
            return []
        if builder.paused or builder.spilled or builder.slots < 1 or builder.budget < self.growth:
            return []
        if builder.budget < self.tuning.quantum and not self.queue.ending:
            return []
        if self.policy.urgent is not None:
            rank = self.policy.rank(blocked, builder.pass_info, self.tuning)
            if rank[-2] < self.policy.urgent:
                return []
        first = next(behind, None)
        if first is None:
            return []
        sight = (blocked, first, self.queue.changes)
        if sight == self._seen and builder.budget < self._least_budget:
            return []
        found: list[RequestState] = []
        least = 1 << 60
        for request in chain((first,), islice(behind, BACKFILL_DEPTH - 1)):
            if len(found) == most:
                break
            need = max(self._headroom(request), min(self.tuning.quantum, request.remaining))
            if need <= builder.budget:
                need += self.accounting.required(request)
            if not builder.has_room_for(request, need):
                least = min(least, need)
                continue
            builder.start(request, need)
            found.append(request)
            if builder.slots < 1:
                break
        # A request found here may not get to start, and is found again then.
        self._seen = None if found else sight
        self._least_budget = least
        return found

    def is_content(self, spare_tokens: int) -> bool:
        """Whether there is nothing to decide: no request waits, and with `spare_tokens` left after
        the next steps none has to give way."""
        return spare_tokens >= 0 and not self.queue

    def _headroom(self, request: RequestState) -> int:
        return max(self.growth, min(self.tuning.headroom, request.remaining))

    def stays_blocked(self, request: RequestState, rank: Rank, pass_no: int) -> bool:
        """Whether displacement failed recently for `request` at this `rank`."""
        return (request, rank) == self._gave_up and pass_no < self._look_again

    def gave_up_on(self, request: RequestState, rank: Rank, pass_no: int, lacked: str) -> None:
        """Note that displacement failed for `request` at this `rank`, and what it lacked."""
        self._gave_up, self.lacked = (request, rank), lacked
        self._look_again = pass_no + PATIENCE


class PlanBuilder:
    """A plan in the making: what is left to give, and which requests give way."""

    def __init__(
        self,
        planner: Planner,
        running: Sequence[RequestState],
        pass_info: PassInfo,
        budget: int,
        slots: int,
        beside: Iterable[int],
    ) -> None:
        self.planner = planner
        self.accounting = planner.accounting
        self.running = running
        self.pass_info = pass_info
        self.budget = budget
        self.slots = slots
        self.beside = list(beside)
        self.paused: list[RequestState] = []
        self.parked: list[RequestState] = []
        self.spilled: dict[RequestState, int] = {}
        self.starting: set[RequestState] = set()
        self.shortage = "memory"
        self._parked: list[RequestState] | None = None
        self._ranking: Iterator[RequestState] | None = None
        self._worst: list[RequestState] = []
        self._given = 0
        self._gave: dict[RequestState, int] = {}

    def start(self, request: RequestState, need: int) -> None:
        """`request` starts, and `need` KV entries are kept for it."""
        self.budget -= need
        self.slots -= 1
        self._take(self.accounting.required_beside(request))
        self.starting.add(request)

    def _take(self, beside: Iterable[int]) -> None:
        for i, amount in enumerate(beside):
            self.beside[i] -= amount

    def has_room_for(self, request: RequestState, need: int) -> bool:
        """Whether `request` fits, with `need` KV entries."""
        fits = need <= self.budget and self.slots >= 1 and self.accounting.adapter_fits(request)
        return fits and not any(self._lacking(self.accounting.required_beside(request)))

    def _lacking(self, beside: Iterable[int]) -> list[bool]:
        return [need > have for need, have in zip(beside, self.beside, strict=True)]

    @property
    def _is_short(self) -> bool:
        """Whether the next decode steps do not fit."""
        grow = zip(self.beside, GROWS_BESIDE, strict=True)
        return self.budget < 0 or any(grows and have < 0 for have, grows in grow)

    def free_for_decode(self, *, allow_better: bool = False) -> None:
        """Free KV for the next decode steps.

        Pause the lowest-ranked request first; on ties prefer one that is already paused. Never
        pause the last running request. Until the queue has been served, do not pause a request that
        ranks above it, unless `allow_better`.
        """
        if not self._is_short:
            return
        planner, pass_info = self.planner, self.pass_info
        parked = [
            r
            for r in planner.queue.resident_worst_first(pass_info)[::-1]
            if r not in self.spilled and r not in self.starting
        ]
        victims = [*planner.victims.worst_first(self.running, pass_info)][::-1]
        running = [r for r in victims if r not in self._gave]

        def rank(request: RequestState) -> Rank:
            return planner.policy.rank(request, pass_info, planner.tuning)

        while self._is_short:
            runs_worse = bool(parked and running) and rank(running[-1]) > rank(parked[-1])
            if running and len(self.running) - len(self.paused) > 1 and (runs_worse or not parked):
                self._pause(running.pop())
            elif parked and (allow_better or not runs_worse):
                self._spill(parked.pop())
            else:
                return

    def make_room_for(self, request: RequestState, need: int) -> bool:
        """Make room for a request that starts, by requests of strictly worse rank alone. If they
        do not suffice, none gives way. Nor does any for an adapter: a request of better rank may
        have the same one."""
        planner = self.planner
        if not self.accounting.adapter_fits(request):
            self.shortage = "adapters"
            return False
        required = self.accounting.required_beside(request)
        have = (self.budget, *self.beside)
        lacks = [n - h for n, h in zip((need, *required), have, strict=True)]
        slots = 1 - self.slots
        short = [name for name, n in zip(("memory", *BESIDE), lacks, strict=True) if n > 0]
        self.shortage = "slots" if slots > 0 else short[0]
        spills = self._spills(lacks, besides=request)
        for spill in spills:
            lacks = self._less(lacks, spill)
        if slots > 0 or max(lacks) > 0:
            rank = planner.policy.rank(request, self.pass_info, planner.tuning)
            if planner.stays_blocked(request, rank, self.pass_info.pass_no):
                self.shortage = planner.lacked
                return False
            victims = self._displaced(rank, lacks, slots)
            if victims is None:
                planner.gave_up_on(request, rank, self.pass_info.pass_no, self.shortage)
                return False
            for victim in victims:
                self._pause(victim)
        for spill in spills:
            self._spill(spill)
        return True

    def spill_all(self, besides: RequestState) -> None:
        """All resident requests give way: what they share is counted for none of them."""
        for request in self._spills((UNLIMITED,) * (1 + len(BESIDE)), besides=besides):
            self._spill(request)

    def _less(self, lacks: Sequence[int], giving: RequestState, growth: int = 0) -> list[int]:
        """What is lacking of KV entries and `BESIDE` once `giving` has given way; one that runs
        does not grow any more either."""
        given = (self.accounting.reclaimable(giving), *self.accounting.reclaimable_beside(giving))
        grows = (self.planner.growth, *self.planner.growth_beside)
        return [n - g - growth * more for n, g, more in zip(lacks, given, grows, strict=True)]

    def park_what_fits(self) -> None:
        """Keep KV on the device whose memory is not needed after all, best rank first."""
        for victim in reversed(self.paused):
            if victim.keeps_kv and self._keeps(victim, self._gave[victim]):
                self.parked.append(victim)
        for request in reversed(list(self.spilled)):
            if self._keeps(request, self.spilled[request]):
                del self.spilled[request]

    def _keeps(self, request: RequestState, given: int) -> bool:
        """Take back what `request` would have given, if nothing needs it."""
        beside = self.accounting.reclaimable_beside(request)
        if given > self.budget or any(self._lacking(beside)):
            return False
        self.budget -= given
        self._take(beside)
        return True

    def _spills(
        self, lacks: Sequence[int], besides: RequestState | None = None
    ) -> list[RequestState]:
        """The fewest resident requests, worst first, that give back what `lacks`, of KV entries and
        `BESIDE`, or all of them."""
        if max(lacks) <= 0 or not self.planner.queue.resident:
            return []
        if self._parked is None:
            self._parked = self.planner.queue.resident_worst_first(self.pass_info)
        chosen: list[RequestState] = []
        for request in self._parked:
            if max(lacks) <= 0:
                break
            if request is besides or request in self.starting or request in self.spilled:
                continue
            if self.planner.accounting.reclaimable(request):
                chosen.append(request)
                lacks = self._less(lacks, request)
        return chosen

    def _displaced(self, rank: Rank, lacks: Sequence[int], slots: int) -> list[RequestState] | None:
        """The requests that give way to `rank`: as many as give back what `lacks`, of KV entries
        and `BESIDE`, and `slots`. None if those of strictly worse rank do not suffice."""
        planner = self.planner
        if planner.policy.worst is not None and rank >= planner.policy.worst:
            if any(r.pausable and r not in self._gave for r in self.running):
                self.shortage = "rank"
            return None
        for fresh in (False, True):
            if fresh and planner.victims.is_fresh(self.pass_info):
                break
            taken: list[RequestState] = []
            left, lacking = lacks, slots
            for victim in self._worst_left(fresh=fresh):
                victims_rank = planner.policy.rank(victim, self.pass_info, planner.tuning)
                if victims_rank <= rank:
                    self.shortage = "rank"
                    break
                if not planner.policy.displaces(rank, victims_rank):
                    self.shortage = "rank"
                    continue
                if lacking <= 0 and not planner.accounting.reclaimable(victim):
                    continue
                taken.append(victim)
                left = self._less(left, victim, growth=1)
                lacking -= 1
                if max(left) <= 0 and lacking <= 0:
                    return taken
        return None

    def _worst_left(self, *, fresh: bool) -> Iterator[RequestState]:
        """Running requests that have not given way yet, worst first. The beginning of the ranking
        that has given way is not walked again, and the ranking no further than asked for."""
        if self._ranking is None or fresh:
            ranked = self.planner.victims.worst_first(self.running, self.pass_info, fresh=fresh)
            self._ranking = (r for r in ranked if r not in self._gave)
            self._worst, self._given = [], 0
        while self._given < len(self._worst) and self._worst[self._given] in self._gave:
            self._given += 1
        yield from (r for r in islice(self._worst, self._given, None) if r not in self._gave)
        for request in self._ranking:
            self._worst.append(request)
            yield request

    def _pause(self, victim: RequestState) -> None:
        given = self.accounting.reclaimable(victim)
        self._gave[victim] = given
        self.paused.append(victim)
        self.budget += given + self.planner.growth
        self.slots += 1
        self._take(-n for n in self.accounting.reclaimable_beside(victim))
        self._take(-n for n in self.planner.growth_beside)

    def _spill(self, request: RequestState) -> None:
        given = self.accounting.reclaimable(request)
        self.spilled[request] = given
        self.budget += given
        self._take(-n for n in self.accounting.reclaimable_beside(request))
