"""When answers will begin: a range of seconds, from the policy itself fast-forwarded.

How long a request still thinks is drawn from nothing: the conditional quantiles of `LengthTable`
say it. How fast it gets there depends on everybody else: so the policy ranks, starts and pauses
what is here now and what will come, coarsely, in steps of up to a quantum. Requests are cohorts
whose number shrinks as their members end their phase; each step gives memory and slots by rank. The
time at which a cohort has so many tokens is the answer for all its members. How far such times were
off is learnt from what came of them (`forecast_errors`).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pascal_sglang.policy.fairness import OTHERS, TenantGroups, with_fairness
from pascal_sglang.policy.forecast import PORTION, Forecaster
from pascal_sglang.policy.forecast_errors import ARRIVAL, SHARES, Estimate, made_at, range_of
from pascal_sglang.policy.length_table import LengthTable
from pascal_sglang.policy.outlook import ArrivalOutlook, Course, Outlook
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.placement import GROWING_SHARE
from pascal_sglang.policy.plan import room_to_grow
from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Rank
from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

# Steps of a fast-forward, the first in seconds, and how much longer each is than the one before.
STEPS = 28
FIRST_STEP_S = 0.5
GROWS = 1.25
# Quanta that a step lasts at most: ranks change with each.
STEP_QUANTA = 2.0
# Steps with whose arrivals a cohort is made.
ARRIVAL_STEPS = 2
# Cohorts that requests which are here are put into, apart from the last of each kind: thinkers, and
# answers.
THINKERS, ANSWERERS = 12, 4
# Priorities that are told apart; of more, those of neighbours in rank are much the same.
PRIORITIES = 4
# Cohorts of fewer requests than this are forgotten.
FEWEST = 0.05
# Of a step with fewer requests, the part that grows with their number is smaller in proportion.
FEW = 16.0
# Requests that will come have larger numbers than this.
FIRST_SEQ = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """One request whose answer has not ended.

    kv_tokens: KV entries that it holds or needs. limit: the most tokens that it may still produce
    in this phase. thinks: whether it is known to think, or not to, as a share. thinks_s: seconds
    since its first token; None before it has one.
    """

    state: RequestState
    kv_tokens: int
    limit: int = 1 << 30
    thinks: float = 1.0
    thinks_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The instance: KV entries and slots, and what prefilling a token takes, in seconds."""

    capacity: int
    slots: int
    prefill_token_s: float = 0.0


@dataclass(slots=True, eq=False)
class Cohort:
    """Requests that fare alike.

    state: one that stands for all. count: how many of them are still in their phase. kv: entries of
    each. limits: tokens of the phase that they do not exceed, the least first; empty without
    limits. thinks: share of them that will think, once they are prefilled. share: of them that
    runs. unfilled: tokens of each that need a prefill; filled: the share for which that has been
    promised, and fills_s: seconds that it still takes, with those before it. curve: the seconds and
    the tokens of the phase after each step.
    """

    state: RequestState
    count: float
    kv: float
    limits: Sequence[float] = ()
    thinks: float = 1.0
    unfilled: float = 0.0
    share: float = 0.0
    filled: float = 0.0
    fills_s: float = 0.0
    begins_s: float = 0.0
    curve: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def below_limits(self, tokens: float) -> float:
        """Share of those that were here at the beginning whose limit is above this."""
        if not self.limits:
            return 1.0
        return 1 - bisect_right(self.limits, tokens) / len(self.limits)


# What sets answers apart: reader, priority, whether they run, and the group of their tenant.
Kind = tuple[Reader, int, bool, str]
# A request and what orders it; its number is unique.
Ranked = tuple[Rank, float, int, int, Present]


def outlook(
    forecaster: Forecaster, present: Iterable[Present], machine: Machine, pass_info: PassInfo
) -> Iterator[Outlook | None]:
    """Fast-forward from now on, a step at a time, each of which takes a fraction of a
    millisecond; the last one yields the outlook. present: is gone through in portions."""
    run = FastForward(forecaster, machine, pass_info)
    yield from run.take_in(present)
    while run.step():
        yield None
    found: dict[RequestState, Estimate] = {}
    courses: dict[RequestState, Course] = {}
    for cohort, group in run.members:
        for begin in range(0, len(group), PORTION):
            for each in group[begin : begin + PORTION]:
                course = courses[each.state] = run.course(cohort, each)
                found[each.state] = run.estimate(course, each)
            yield None
    by_tenant = {} if run.groups is None else run.groups.apart
    yield Outlook(
        pass_info.now,
        found,
        courses,
        run.arrival_outlook(OTHERS),
        {tenant: run.arrival_outlook(tenant) for tenant in by_tenant},
    )


class FastForward:
    """One run into the future."""

    def __init__(self, forecaster: Forecaster, machine: Machine, pass_info: PassInfo) -> None:
        self.forecaster = forecaster
        self.machine = machine
        self.pass_info = pass_info
        self.policy, self.tuning = forecaster.policy, forecaster.tuning
        self.groups: TenantGroups | None = None
        self.token_s = forecaster.token_s or pass_info.token_s or 0.02
        self.passed = 0.0
        self.steps = 0
        self.next_step_s = FIRST_STEP_S
        # Seconds of prefills that have been promised and not done.
        self._prefill_s = 0.0
        self._seq = FIRST_SEQ
        arrivals = forecaster.arrivals
        self.rates = arrivals.rates(pass_info.now)
        self.prompt, self.arrivals_think = arrivals.prompt, arrivals.thinks
        self.members: list[tuple[Cohort, Sequence[Present]]] = []
        self.cohorts: list[Cohort] = []
        self.median = forecaster.thoughts.quantile(0.5)
        # Those who arrive now, by the group of their tenant, and the seconds that each waits.
        self.arriving: dict[str, Cohort] = {}
        self.waits_s: dict[str, float] = {}
        # How many that have come are in no cohort yet, and the last cohort of answers by what sets
        # answers apart.
        self._come = 0.0
        self._answering: dict[Kind, Cohort] = {}

    def take_in(self, present: Iterable[Present]) -> Iterator[None]:
        """Begin with the requests that are here, a portion at a time."""
        counters = self.forecaster.tenants
        requests: Counter[str] = Counter()
        policy = self.policy if counters is None else with_fairness(self.policy, counters)
        # In order of rank within a portion, which are merged then.
        portions: dict[Phase, list[list[Ranked]]] = {phase: [[]] for phase in Phase}
        counts = Counter[Phase]()
        priorities: set[int] = set()
        for number, each in enumerate(present, 1):
            state = each.state
            counts[state.phase] += 1
            if len(priorities) <= PRIORITIES:
                priorities.add(state.priority)
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
        apart = len(priorities) <= PRIORITIES
        for phase, most in ((Phase.REASONING, THINKERS), (Phase.ANSWERING, ANSWERERS)):
            portions[phase][-1].sort()
            merged = heapq.merge(*portions[phase])
            for group in self._grouped(merged, -(-counts[phase] // most), apart=apart):
                if group is not None:
                    self.cohorts.append(self._cohort(group, phase))
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

    def _grouped(
        self, ranked: Iterable[Ranked], size: int, *, apart: bool
    ) -> Iterator[list[Present] | None]:
        """In groups of one kind, of at most `size` neighbours in rank; None after each portion.
        apart: those of another priority are of another kind."""
        groups: dict[object, list[Present]] = {}
        for number, (*_, each) in enumerate(ranked, 1):
            state = each.state
            runs = state.status is RequestStatus.RUNNING
            priority = state.priority if apart else 0
            kind = (runs, state.total_tokens > 0, state.reader, priority, self._group_of(state))
            group = groups.setdefault(kind, [])
            group.append(each)
            if len(group) == size:
                yield groups.pop(kind)
            if number % PORTION == 0:
                yield None
        yield from groups.values()

    def _cohort(self, group: Sequence[Present], phase: Phase) -> Cohort:
        """phase: as it was when they were ranked; some may have begun to answer since."""
        still = [p for p in group if p.state.phase is phase] or group
        middle, count = still[len(still) // 2].state, len(group)
        pacer = middle.pacer
        tokens = sum(p.state.phase_tokens for p in still) / len(still)
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
            phase=phase,
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
        fresh = not middle.total_tokens and phase is Phase.REASONING
        cohort = Cohort(
            state,
            count,
            kv,
            sorted(tokens + p.limit for p in group),
            thinks=sum(p.thinks for p in group) / count if fresh else 1.0,
            unfilled=kv if waits else 0.0,
        )
        cohort.curve[0].append(0.0)
        cohort.curve[1].append(tokens)
        return cohort

    def _arrived(self, count: float, tenant: str) -> Cohort:
        """Those of a group of tenants among so many who arrive now."""
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
            self._tenants()[tenant] * count,
            self.prompt,
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
        token_s = self._token_s(running)
        step_s = min(self.next_step_s, STEP_QUANTA * self.tuning.quantum * token_s)
        for tenant, arrival in self.arriving.items():
            if arrival.state.phase_tokens < self.median:
                self.waits_s[tenant] += (1 - arrival.share) * step_s
        self.next_step_s *= GROWS
        self._charge(step_s)
        self._transitions(info)
        self._decode(step_s, token_s)
        self._come += self.rates.between(self.passed, self.passed + step_s)
        self.passed += step_s
        if self._come and self.steps % ARRIVAL_STEPS == 0:
            self.cohorts += [
                self._arrived(self._come, t) for t, part in self._tenants().items() if part
            ]
            self._come = 0.0
        return True

    def _token_s(self, running: float) -> float:
        """Seconds per token with so many that run. What has not been measured is of those that
        run now."""
        batch = self.forecaster.batch
        if not self.forecaster.token_s:
            return self.token_s
        grows = GROWING_SHARE * (running - batch) / max(FEW, batch)
        return self.token_s * max(0.5, 1 + grows)

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
        for cohort in [*self.arriving.values(), *(cohort for cohort, _ in self.members)]:
            first, tokens = cohort.curve[1][0], cohort.state.phase_tokens
            left = self._table(cohort).survival(tokens, first) * cohort.below_limits(tokens)
            if left > last:
                return False
        return True

    def _table(self, cohort: Cohort) -> LengthTable:
        """Of the lengths of the phase: of those who are here limits are known."""
        if cohort.state.phase is not Phase.REASONING:
            return self.forecaster.answers
        arrives = cohort.state.seq > FIRST_SEQ
        return self.forecaster.thoughts if arrives else self.forecaster.thinking

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
        for cohort in self.cohorts:
            state = cohort.state
            tokens = cohort.share * step_s / token_s
            before = state.phase_tokens
            thinks = state.phase is Phase.REASONING
            count = cohort.count
            if cohort.unfilled and cohort.share > cohort.filled:
                tokens_to_fill = cohort.unfilled * (cohort.share - cohort.filled)
                own_s = tokens_to_fill * self.machine.prefill_token_s
                self._prefill_s += own_s * count
                cohort.fills_s = max(self._prefill_s, cohort.fills_s, own_s)
                cohort.filled = cohort.share
            if cohort.filled and cohort.share:
                fills_s = min(step_s, cohort.fills_s)
                cohort.fills_s -= fills_s
                tokens *= 1 - fills_s / step_s
                if not cohort.fills_s:
                    count *= cohort.thinks
                    cohort.thinks = 1.0
            if tokens > 0:
                state.phase_tokens = before + tokens  # type: ignore[assignment]
                state.total_tokens += tokens  # type: ignore[assignment]
                cohort.kv += tokens
                alive = self._table(cohort).survival(state.phase_tokens, before)
                within = cohort.below_limits(before)
                count *= alive * cohort.below_limits(state.phase_tokens) / within if within else 0.0
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
        return Cohort(state, count, kv)

    def course(self, cohort: Cohort, member: Present) -> Course:
        """Of a request that is here."""
        (times, counts), made = cohort.curve, made_at(member.thinks_s)
        return Course(made, times, counts, self.token_s, counts[0], member.state.phase_tokens)

    def estimate(self, course: Course, member: Present) -> Estimate:
        """Of a request that is here."""
        forecaster = self.forecaster
        lengths = forecaster.lengths(member.state.phase_tokens, member.limit)
        expected = [course.expected(tokens) for tokens in lengths]
        return range_of(expected, forecaster.errors.of(course.made))

    def arrival_outlook(self, tenant: str) -> ArrivalOutlook:
        """Of a request that arrives now, of a group of tenants."""
        times, counts = self.arriving[tenant].curve
        return ArrivalOutlook(
            [round(seconds, 3) for seconds in times],
            [round(count, 1) for count in counts],
            [round(tokens, 1) for tokens in self.forecaster.lengths(0.0, math.inf)],
            round(self.prompt, 1),
            self.machine.prefill_token_s,
            round(self.waits_s[tenant], 3),
            self.token_s,
            self.forecaster.errors.of(ARRIVAL),
        )
