"""When a request's answer will begin: a range of seconds, from the policy itself fast-forwarded.

How long a request still thinks is drawn from nothing: the conditional quantiles of `LengthTable`
say it. How fast it gets there depends on everybody else: so the policy ranks, starts and pauses
what is here now and what will come, coarsely, in steps of up to a quantum. Requests are cohorts
whose number shrinks as their members end their phase; each step gives memory and slots by rank. The
time at which a cohort has so many tokens is the answer for all its members.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pascal_sglang.policy.fairness import OTHERS, TenantCounters, TenantGroups, with_fairness
from pascal_sglang.policy.length_table import ANSWERS, THINKING, LengthTable
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.placement import GROWING_SHARE
from pascal_sglang.policy.plan import room_to_grow
from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

# The range is from the first to the last of these, as shares of answers that have begun by then.
SHARES = (0.1, 0.5, 0.9)
# How much sooner, and later, than on average a request that has begun to think gets a place again,
# at the first and the last of these: by a factor whose logarithm is this over the root of the
# number of requests that run. The fewer they are, the less is what they take together like its
# mean. Fitted to ServeGen's requests on an instance of 16,800 KV tokens, where 5 to 7 run, at loads
# 0.7 to 1.3 (`sim.experiments.calibration`).
SOONER, LATER = 6.0, 4.0
# Fewer that run than this count as so many.
LEAST_BATCH = 4.0
# Steps of a fast-forward, the first in seconds, and how much longer each is than the one before.
STEPS = 28
FIRST_STEP_S = 0.5
GROWS = 1.25
# Quanta that a step lasts at most: ranks change with each.
STEP_QUANTA = 2.0
# Steps with whose arrivals a cohort is made.
ARRIVAL_STEPS = 2
# Cohorts that requests which are here are put into: thinkers, and answers.
THINKERS, ANSWERERS = 12, 4
# Cohorts of fewer requests than this are forgotten.
FEWEST = 0.05
# Seconds for which arrivals are remembered.
ARRIVALS_S = 120.0
# Part of a measured speed that the next one replaces.
LEARNS = 0.2
# Requests that are gone through at once: a fraction of a millisecond.
PORTION = 64


class Estimate(NamedTuple):
    """Seconds until a request's first answering token."""

    p10: float
    p50: float
    p90: float


# What a forecast is called by when it was made: when the request arrived, while it had no token, or
# so many seconds after its first token.
ARRIVAL, WAITING = "arrival", "waiting"
STRETCHES = (0.0, 10.0, 30.0, 90.0)
WHEN = (ARRIVAL, WAITING, *(f"{begin:g}s" for begin in STRETCHES))
# What came of a forecast: the answer began before its range, inside it, or after it.
OUTCOMES = ("early", "inside", "late")


@dataclass(slots=True, kw_only=True)
class Calibration:
    """Compares forecasts with what came of them: of each request the first in every stretch."""

    # How many forecasts came out how, by when they were made; `by_p50` counts answers that had
    # begun by the median.
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {when: Counter() for when in WHEN}
    )
    _open: dict[RequestState, dict[str, tuple[float, Estimate]]] = field(default_factory=dict)

    def arrived(self, request: RequestState, now: float, estimate: Estimate) -> None:
        self._open.setdefault(request, {})[ARRIVAL] = (now, estimate)

    def at_arrival(self, request: RequestState) -> tuple[float, Estimate] | None:
        """The forecast at arrival, and when that was."""
        return self._open.get(request, {}).get(ARRIVAL)

    def forecast(
        self, request: RequestState, now: float, first_token: float | None, estimate: Estimate
    ) -> None:
        """first_token: when the request had its first token; None before."""
        thinks_s = -1.0 if first_token is None else now - first_token
        when = WHEN[1 + sum(thinks_s >= begin for begin in STRETCHES)]
        self._open.setdefault(request, {}).setdefault(when, (now, estimate))

    def followed(self) -> set[RequestState]:
        """Requests whose answers are waited for."""
        return set(self._open)

    def began(self, request: RequestState, now: float) -> list[tuple[str, str]]:
        """The request's answer begins: when its forecasts were made, and what came of each."""
        found = []
        for when, (at, estimate) in self._open.pop(request, {}).items():
            seconds = now - at
            outcome = "late" if seconds > estimate.p90 else "inside"
            if seconds < estimate.p10:
                outcome = "early"
            self.counts[when][outcome] += 1
            self.counts[when]["by_p50"] += seconds <= estimate.p50
            found.append((when, outcome))
        return found

    def gone(self, request: RequestState) -> None:
        """The request has ended without an answer, or has gone elsewhere: that says nothing."""
        self._open.pop(request, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """One request whose answer has not ended.

    kv_tokens: KV entries that it holds or needs. limit: the most tokens that it may still produce
    in this phase. thinks: whether it is known to think, or not to, as a share.
    """

    state: RequestState
    kv_tokens: int
    limit: int = 1 << 30
    thinks: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The instance: KV entries and slots, and what prefilling a token takes, in seconds."""

    capacity: int
    slots: int
    prefill_token_s: float = 0.0


@dataclass(slots=True, eq=False)
class Cohort:
    """Requests that fare alike.

    state: one that stands for all. count: how many of them are still in their phase, and `whole` at
    the beginning. kv: entries of each. limit: tokens of the phase that none exceeds. thinks: share
    of them that will think. unfilled: tokens of each that a prefill has still to make. curve: the
    seconds and the tokens of the phase after each step.
    """

    state: RequestState
    count: float
    kv: float
    limit: float
    thinks: float = 1.0
    unfilled: float = 0.0
    share: float = 0.0
    begins_s: float = 0.0
    curve: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


def seconds_to(times: Sequence[float], counts: Sequence[float], tokens: float) -> float:
    """When a curve reaches so many tokens; beyond it, it goes on as fast as it went altogether."""
    if tokens <= counts[0]:
        return times[0]
    number = bisect_left(counts, tokens)
    if number == len(counts):
        gained = counts[-1] - counts[0]
        if gained <= 0:
            return times[-1]
        return times[-1] + (tokens - counts[-1]) * (times[-1] - times[0]) / gained
    low, high = counts[number - 1], counts[number]
    part = (tokens - low) / (high - low)
    return times[number - 1] + part * (times[number] - times[number - 1])


class Arrivals:
    """The rate of arrivals and what they are like, over the last `ARRIVALS_S` seconds."""

    def __init__(self) -> None:
        self._count = 0.0
        self._thinking = 0.0
        self._prompts = 0.0
        self._began: float | None = None
        self._at = 0.0

    def add(self, now: float, prompt: int, thinks: bool) -> None:
        self._fade(now)
        self._count += 1
        self._thinking += thinks
        self._prompts += prompt

    def _fade(self, now: float) -> None:
        if self._began is None:
            self._began = self._at = now
        kept = math.exp(-max(0.0, now - self._at) / ARRIVALS_S)
        self._at = max(self._at, now)
        self._count *= kept
        self._thinking *= kept
        self._prompts *= kept

    def rate(self, now: float) -> float:
        """Requests per second."""
        self._fade(now)
        assert self._began is not None
        seen = ARRIVALS_S * -math.expm1(-max(1.0, now - self._began) / ARRIVALS_S)
        return self._count / seen

    @property
    def prompt(self) -> float:
        """Mean prompt tokens."""
        return self._prompts / self._count if self._count else 0.0

    @property
    def thinks(self) -> float:
        """Share of requests that think."""
        return self._thinking / self._count if self._count else 1.0


@dataclass(frozen=True, slots=True)
class ArrivalOutlook:
    """How a request fares that arrives at a given moment.

    times, tokens: when it has so many tokens, in seconds after it. lengths: tokens until its
    answer, at `SHARES`. prompt: tokens of its prompt; each more of them takes
    `prefill_token_s` longer. waits_s: seconds in which it does not run, until the median of its
    answers.
    """

    times: Sequence[float]
    tokens: Sequence[float]
    lengths: Sequence[float]
    prompt: float
    prefill_token_s: float
    waits_s: float

    def estimate(self, prompt: float, *, thinks: bool = True, limit: float = math.inf) -> Estimate:
        """prompt: its tokens. limit: the most tokens that it may think for."""
        more_s = (prompt - self.prompt) * self.prefill_token_s
        sought = [min(limit, length) if thinks else 0.0 for length in self.lengths]
        return Estimate(
            *(
                max(0.0, more_s + seconds_to(self.times, self.tokens, max(1.0, tokens)))
                for tokens in sought
            )
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecast of one moment. at: that moment, in seconds. requests: those whose answer has not
    begun. arrival: a request that arrives then; by_tenant: the same for tenants that are told
    apart, and `arrival` for one of the others. usual: for one of the tenant that most requests are
    of."""

    at: float
    requests: Mapping[RequestState, Estimate]
    arrival: ArrivalOutlook
    by_tenant: Mapping[str, ArrivalOutlook] = field(default_factory=dict)

    @property
    def usual(self) -> ArrivalOutlook:
        return next(iter(self.by_tenant.values()), self.arrival)


class Seen(NamedTuple):
    """A request at the last look, at `at`: `tokens` of its phase, all of them, and since when it
    has its status."""

    at: float
    phase: Phase
    tokens: int
    total_tokens: int
    since: float

    def tokens_in(self, phase: Phase) -> int:
        """What was known of a phase."""
        return self.tokens if self.phase is phase else 0


class Forecaster:
    """Learns lengths and speed of one instance, and forecasts from them."""

    def __init__(self, policy: Policy, tuning: Tuning, tpot: float) -> None:
        """tpot: the reader's pace of requests that ask for none, in seconds per token."""
        self.policy = policy
        self.tuning = tuning
        self.tpot = tpot
        # Where tenants are told apart, which `policy` does not do.
        self.tenants: TenantCounters | None = None
        self.thinking = LengthTable(THINKING)
        self.answers = LengthTable(ANSWERS)
        self.arrivals = Arrivals()
        # Seconds per token of a request that runs, measured, and how many ran beside it.
        self.token_s = 0.0
        self.batch = 0.0
        # The requests that were here at the last look.
        self._seen: dict[RequestState, Seen] = {}

    def look(self, present: Iterable[RequestState], now: float) -> None:
        """Learn from how far the requests that are here have come since the last look."""
        for _ in self.looking(present, lambda: now):
            pass

    def looking(
        self, present: Iterable[RequestState], clock: Callable[[], float]
    ) -> Iterator[None]:
        """The same, a portion of the requests at a time, each at the time that it is then."""
        speeds: list[float] = []
        running = 0
        here: set[RequestState] = set()
        for number, state in enumerate(present, 1):
            here.add(state)
            before = self._seen.get(state)
            phase, tokens = state.phase, state.phase_tokens
            runs = state.status is RequestStatus.RUNNING
            running += runs and state.total_tokens > 0
            self._table(phase).passed(0 if before is None else before.tokens_in(phase), tokens)
            now = clock()
            if before is not None and runs and before.since == state.since and before.total_tokens:
                speeds.append((state.total_tokens - before.total_tokens) / (now - before.at))
            self._seen[state] = Seen(now, phase, tokens, state.total_tokens, state.since)
            if number % PORTION == 0:
                yield
        self._seen = {state: seen for state, seen in self._seen.items() if state in here}
        speeds = sorted(speed for speed in speeds if speed > 0)
        if speeds:
            token_s = 1 / speeds[len(speeds) // 2]
            part = LEARNS if self.token_s else 1.0
            self.token_s += part * (token_s - self.token_s)
            self.batch += part * (running - self.batch)

    def _table(self, phase: Phase) -> LengthTable:
        return self.thinking if phase is Phase.REASONING else self.answers

    def ended(self, state: RequestState, phase: Phase, tokens: int, *, cut: bool = False) -> None:
        """A phase of the request has ended after `tokens`. cut: by a limit, an abort, an error."""
        before = self._seen.get(state)
        known = 0 if before is None else before.tokens_in(phase)
        if cut:
            self._table(phase).passed(known, tokens)
        else:
            self._table(phase).ended(known, tokens)

    def outlook(
        self, present: Iterable[Present], machine: Machine, pass_info: PassInfo
    ) -> Iterator[Outlook | None]:
        """Fast-forward from now on, a step at a time, each of which takes a fraction of a
        millisecond; the last one yields the outlook. present: is gone through in portions."""
        run = FastForward(self, machine, pass_info)
        yield from run.take_in(present)
        while run.step():
            yield None
        found: dict[RequestState, Estimate] = {}
        for cohort, group in run.members:
            for begin in range(0, len(group), PORTION):
                part = group[begin : begin + PORTION]
                found.update((each.state, run.estimate(cohort, each)) for each in part)
                yield None
        by_tenant = {} if run.groups is None else run.groups.apart
        yield Outlook(
            pass_info.now,
            found,
            run.arrival_outlook(OTHERS),
            {tenant: run.arrival_outlook(tenant) for tenant in by_tenant},
        )

    def tokens_left(self, tokens: float, limit: float) -> tuple[float, ...]:
        """Quantiles of thinking tokens still to come."""
        return tuple(min(limit, q - tokens) for q in self.thinking.quantiles(SHARES, tokens))


# What sets answers apart: reader, priority, whether they run, and the group of their tenant.
Kind = tuple[Reader, int, bool, str]
# A request and what orders it; its number is unique.
Ranked = tuple[Rank, float, int, int, Present]


class FastForward:
    """One run into the future."""

    def __init__(self, forecaster: Forecaster, machine: Machine, pass_info: PassInfo) -> None:
        self.forecaster = forecaster
        self.machine = machine
        self.pass_info = pass_info
        self.policy, self.tuning = forecaster.policy, forecaster.tuning
        self.groups: TenantGroups | None = None
        self.token_s = forecaster.token_s or pass_info.token_s or 0.02
        self.batch = max(1.0, forecaster.batch)
        root = math.sqrt(max(LEAST_BATCH, self.batch))
        # By what the wait for a place is multiplied, at each of `SHARES`.
        self.spread = (math.exp(-SOONER / root), 1.0, math.exp(LATER / root))
        self.passed = 0.0
        self.steps = 0
        self.next_step_s = FIRST_STEP_S
        # Seconds of prefills that have been promised and not done.
        self._prefill_s = 0.0
        self._seq = 1 << 40
        arrivals = forecaster.arrivals
        self.rate = arrivals.rate(pass_info.now)
        self.prompt, self.arrivals_think = arrivals.prompt, arrivals.thinks
        self.members: list[tuple[Cohort, Sequence[Present]]] = []
        self.cohorts: list[Cohort] = []
        self.median = forecaster.thinking.quantile(0.5)
        # Those who arrive now, by the group of their tenant, and the seconds that each waits.
        self.arriving: dict[str, Cohort] = {}
        self.waits_s: dict[str, float] = {}
        # Seconds whose arrivals are in no cohort yet, and the last cohort of answers by what sets
        # answers apart.
        self._arriving_s = 0.0
        self._answering: dict[Kind, Cohort] = {}

    def take_in(self, present: Iterable[Present]) -> Iterator[None]:
        """Begin with the requests that are here, a portion at a time."""
        counters = self.forecaster.tenants
        requests: Counter[str] = Counter()
        policy = self.policy if counters is None else with_fairness(self.policy, counters)
        # In order of rank within a portion, which are merged then.
        portions: dict[Phase, list[list[Ranked]]] = {phase: [[]] for phase in Phase}
        counts = Counter[Phase]()
        for number, each in enumerate(present, 1):
            state = each.state
            counts[state.phase] += 1
            requests[state.tenant] += 1
            rank = policy.rank(state, self.pass_info, self.tuning)
            ranked = (rank, policy.key(state, self.tuning), state.seq, number, each)
            portions[state.phase][-1].append(ranked)
            if number % PORTION == 0:
                for mine in portions.values():
                    mine[-1].sort()
                    mine.append([])
                yield
        if counters is not None:
            self.groups = TenantGroups(counters, requests)
            self.policy = with_fairness(self.policy, self.groups)
        self.queue = WaitQueue(self.policy, self.tuning)
        for phase, most in ((Phase.REASONING, THINKERS), (Phase.ANSWERING, ANSWERERS)):
            portions[phase][-1].sort()
            merged = heapq.merge(*portions[phase])
            for group in self._grouped(merged, -(-counts[phase] // most)):
                if group is not None:
                    self.cohorts.append(self._cohort(group))
                    if phase is Phase.REASONING:
                        self.members.append((self.cohorts[-1], group))
                yield
        for tenant in self._tenants():
            self.arriving[tenant], self.waits_s[tenant] = self._arrived(0.0, tenant), 0.0
        self.cohorts += self.arriving.values()

    def _tenants(self) -> Mapping[str, float]:
        """Groups of tenants, and the part of the requests that is theirs."""
        return {OTHERS: 1.0} if self.groups is None else self.groups.shares

    def _group_of(self, state: RequestState) -> str:
        return OTHERS if self.groups is None else self.groups.group_of(state.tenant)

    def _grouped(self, ranked: Iterable[Ranked], size: int) -> Iterator[list[Present] | None]:
        """In groups of at most `size` neighbours in rank; None after each portion."""
        group: list[Present] = []
        kind: object = None
        for number, (*_, each) in enumerate(ranked, 1):
            state = each.state
            runs = state.status is RequestStatus.RUNNING
            tenant = self._group_of(state)
            mine = (runs, state.total_tokens > 0, state.reader, state.priority, tenant)
            if group and (mine != kind or len(group) == size):
                yield group
                group = []
            group.append(each)
            kind = mine
            if number % PORTION == 0:
                yield None
        if group:
            yield group

    def _cohort(self, group: Sequence[Present]) -> Cohort:
        middle, count = group[len(group) // 2].state, len(group)
        pacer = middle.pacer
        tokens = sum(p.state.phase_tokens for p in group) / count
        state = RequestState(
            seq=middle.seq,
            pacer=Pacer(
                pacer.tpot,
                delivered=max(pacer.delivered, pacer.received),
                first_shown=pacer.first_shown,
                last_shown=pacer.shown,
                floor=pacer.floor,
            ),
            status=middle.status,
            phase=middle.phase,
            phase_tokens=tokens,  # type: ignore[arg-type] # A mean is as good.
            total_tokens=sum(p.state.total_tokens for p in group) / count,  # type: ignore[arg-type]
            since_pass=middle.since_pass,
            since=middle.since,
            head_start=middle.head_start,
            credit=middle.credit,
            ran_from=middle.ran_from,
            reader=middle.reader,
            priority=middle.priority,
            tenant=self._group_of(middle),
        )
        kv = sum(p.kv_tokens for p in group) / count
        waits = state.status is RequestStatus.WAITING
        fresh = not middle.total_tokens and state.phase is Phase.REASONING
        cohort = Cohort(
            state,
            count,
            kv,
            tokens + max(p.limit for p in group),
            thinks=sum(p.thinks for p in group) / count if fresh else 1.0,
            unfilled=kv if waits else 0.0,
        )
        cohort.curve[0].append(0.0)
        cohort.curve[1].append(tokens)
        return cohort

    def _arrived(self, seconds: float, tenant: str) -> Cohort:
        """Those of a group of tenants who arrive in `seconds` from now on."""
        self._seq += 1
        state = RequestState(
            self._seq,
            Pacer(self.forecaster.tpot),
            since_pass=self._info().pass_no,
            since=self._info().now,
            tenant=tenant,
        )
        cohort = Cohort(
            state,
            self.rate * self._tenants()[tenant] * seconds,
            self.prompt,
            math.inf,
            thinks=self.arrivals_think,
            unfilled=self.prompt,
            begins_s=self.passed,
        )
        cohort.curve[0].append(self.passed)
        cohort.curve[1].append(0.0)
        return cohort

    def _info(self) -> PassInfo:
        info = self.pass_info
        passes = int(self.passed / self.token_s)
        return PassInfo(info.pass_no + passes, info.now + self.passed, info.pass_s, info.tokens)

    def step(self) -> bool:
        """Go one step ahead; False once there is nothing more to learn."""
        if self.steps == STEPS or self._far_enough():
            return False
        self.steps += 1
        info = self._info()
        self._share_out(info)
        running = sum(cohort.share * cohort.count for cohort in self.cohorts)
        token_s = self.token_s * max(0.5, 1 + GROWING_SHARE * (running - self.batch) / self.batch)
        step_s = min(self.next_step_s, STEP_QUANTA * self.tuning.quantum * token_s)
        for tenant, arrival in self.arriving.items():
            if arrival.state.phase_tokens < self.median:
                self.waits_s[tenant] += (1 - arrival.share) * step_s
        self.next_step_s *= GROWS
        self._charge(step_s)
        self._transitions(info)
        self._decode(step_s, token_s)
        self.passed += step_s
        self._arriving_s += step_s
        if self.rate and self.steps % ARRIVAL_STEPS == 0:
            seconds = self._arriving_s
            self.cohorts += [
                self._arrived(seconds, t) for t, part in self._tenants().items() if part
            ]
            self._arriving_s = 0.0
        return True

    def _charge(self, step_s: float) -> None:
        """Charge tenants what their requests hold in this step, where some wait."""
        if self.groups is None or all(c.share == 1.0 for c in self.cohorts if c.count):
            return
        for cohort in self.cohorts:
            held = cohort.share * cohort.count * cohort.kv / self.machine.capacity
            self.groups.charge(cohort.state.tenant, held * step_s)
        self.groups.look({c.state.tenant for c in self.cohorts if c.count})

    def _far_enough(self) -> bool:
        """Whether nine of ten of those who are here, and of those who arrive now, answer."""
        last = 1 - SHARES[-1]
        table = self.forecaster.thinking
        for cohort in [*self.arriving.values(), *(cohort for cohort, _ in self.members)]:
            first, tokens = cohort.curve[1][0], cohort.state.phase_tokens
            if tokens < cohort.limit and table.survival(tokens, first) > last:
                return False
        return True

    def _share_out(self, info: PassInfo) -> None:
        """Memory and slots by rank; of equals, those that run keep them."""
        rank, key, tuning = self.policy.rank, self.policy.key, self.tuning
        ranked = [
            (
                rank(c.state, info, tuning),
                c.state.status is not RequestStatus.RUNNING,
                key(c.state, tuning),
                c.state.seq,
                c,
            )
            for c in self.cohorts
        ]
        ranked.sort()
        free, slots = float(self.machine.capacity), float(self.machine.slots)
        grows = (
            room_to_grow(1) + min(self.next_step_s / self.token_s, STEP_QUANTA * tuning.quantum) / 2
        )
        for *_, cohort in ranked:
            need = cohort.kv + grows
            count = max(cohort.count, 1e-9)
            cohort.share = max(0.0, min(1.0, free / (need * count), slots / count))
            free -= cohort.share * need * cohort.count
            slots -= cohort.share * cohort.count

    def _transitions(self, info: PassInfo) -> None:
        for cohort in self.cohorts:
            runs = cohort.state.status is RequestStatus.RUNNING
            if cohort.share >= 0.5 and not runs:
                self.queue.started(cohort.state, info)
            elif cohort.share < 0.5 and runs:
                self.queue.stopped(cohort.state, RequestStatus.HOST, info)

    def _decode(self, step_s: float, token_s: float) -> None:
        """Give those who run their tokens, and take out those who have ended their phase."""
        now = self.pass_info.now + self.passed
        after = self.passed + step_s
        ended: dict[Kind, list[float]] = {}
        left: list[Cohort] = []
        prefill_s = self.machine.prefill_token_s
        for cohort in self.cohorts:
            state = cohort.state
            tokens = cohort.share * step_s / token_s
            before = state.phase_tokens
            thinks = state.phase is Phase.REASONING
            count = cohort.count
            if cohort.share and cohort.unfilled:
                filled = cohort.unfilled * cohort.share
                self._prefill_s += filled * count * prefill_s
                own_s = max(self._prefill_s, filled * prefill_s)
                cohort.unfilled = 0.0
                tokens *= max(0.0, 1 - own_s / step_s)
                count *= cohort.thinks
            if tokens > 0:
                state.phase_tokens = before + tokens  # type: ignore[assignment]
                state.total_tokens += tokens  # type: ignore[assignment]
                cohort.kv += tokens
                table = self.forecaster.thinking if thinks else self.forecaster.answers
                alive = table.survival(state.phase_tokens, before)
                count *= alive if state.phase_tokens < cohort.limit else 0.0
                if not thinks and state.reader is Reader.HUMAN:
                    state.pacer.deliver(now, tokens, step_s / tokens)  # type: ignore[arg-type]
            if thinks:
                cohort.curve[0].append(after)
                cohort.curve[1].append(state.phase_tokens)
                over = cohort.count - count
                if over > 0:
                    runs = state.status is RequestStatus.RUNNING
                    kind = (state.reader, state.priority, runs, state.tenant)
                    mine = ended.setdefault(kind, [0.0, 0.0])
                    mine[0] += over
                    mine[1] += over * (cohort.kv - tokens / 2)
            cohort.count = count
            if count > FEWEST or (thinks and cohort.begins_s == 0.0):
                left.append(cohort)
            else:
                cohort.count = 0.0
        self._prefill_s = max(0.0, self._prefill_s - step_s)
        for kind, (count, kv) in ended.items():
            last = self._answering.get(kind)
            if last is not None and last.count and last.state.phase_tokens < self.tuning.quantum:
                both = last.count + count
                last.kv = (last.count * last.kv + kv) / both
                last.state.phase_tokens *= last.count / both  # type: ignore[assignment]
                last.count = both
            elif count > FEWEST:
                self._answering[kind] = self._answers(now, kind, count, kv / count)
                left.append(self._answering[kind])
        self.cohorts = left

    def _answers(self, now: float, kind: Kind, count: float, kv: float) -> Cohort:
        """Requests whose thinking has ended in this step."""
        reader, priority, runs, tenant = kind
        self._seq += 1
        pacer = Pacer(self.forecaster.tpot)
        pacer.deliver(now, 1)
        state = RequestState(
            self._seq,
            pacer,
            status=RequestStatus.RUNNING if runs else RequestStatus.HOST,
            phase=Phase.ANSWERING,
            phase_tokens=1,
            total_tokens=1,
            since_pass=self._info().pass_no,
            since=now,
            reader=reader,
            priority=priority,
            tenant=tenant,
        )
        return Cohort(state, count, kv, math.inf)

    def estimate(self, cohort: Cohort, member: Present) -> Estimate:
        """Of a request that is here."""
        left = self.forecaster.tokens_left(member.state.phase_tokens, member.limit)
        begun = cohort.curve[1][0]
        spread = self.spread if member.state.total_tokens else (1.0, 1.0, 1.0)
        found: list[float] = []
        for tokens, factor in zip(left, spread, strict=True):
            seconds = seconds_to(*cohort.curve, begun + max(1.0, tokens))
            waits = max(0.0, seconds - max(1.0, tokens) * self.token_s)
            found.append(seconds + (factor - 1.0) * waits)
        return Estimate(*found)

    def arrival_outlook(self, tenant: str) -> ArrivalOutlook:
        """Of a request that arrives now, of a group of tenants."""
        times, counts = self.arriving[tenant].curve
        return ArrivalOutlook(
            [round(seconds, 3) for seconds in times],
            [round(count, 1) for count in counts],
            [round(tokens, 1) for tokens in self.forecaster.tokens_left(0.0, math.inf)],
            round(self.prompt, 1),
            self.machine.prefill_token_s,
            round(self.waits_s[tenant], 3),
        )
