"""SGLang's priorities: what they put first, what they displace, and what they leave alone."""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy, CacheAwarePolicy

from pascal_sglang.engine.priorities import priority_of, take_over
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import GROWTH, PATIENCE, Capacity, Plan, Planner
from pascal_sglang.policy.priorities import Priorities, with_priorities
from pascal_sglang.policy.ranking import OVERDUE, URGENT, PassInfo
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase
from tests.unit.test_plan import MOMENT, NOW, SCHEDULING, TPOT, TUNING, place_in, situation

policies = st.sampled_from(SCHEDULING)
priorities = st.builds(Priorities, preempts=st.booleans(), threshold=st.sampled_from([0, 2, 10]))


@st.composite
def prioritised(draw):
    running, others, capacity = draw(situation())
    for m in [*running, *others]:
        m.priority = draw(st.sampled_from([-(2**63), -3, 0, 1, 2, 5, sys.maxsize + 1]))
    return running, others, capacity


def planner_under(policy, rules, others):
    planner = Planner(with_priorities(POLICIES[policy], rules), TUNING)
    planner.queue.recount(others)
    return planner


def own_rank(policy, m):
    return POLICIES[policy].rank(m, MOMENT, TUNING)


def is_urgent(policy, m):
    return policy == "pascal" and own_rank(policy, m)[0] == URGENT


@given(policies, prioritised())
@settings(max_examples=200, deadline=None)
def test_urgent_answers_first_then_priorities_then_the_policys_own_order(policy, case):
    _, others, _ = case
    planner = planner_under(policy, Priorities(), others)

    def place(m):
        own = own_rank(policy, m)
        key = POLICIES[policy].key(m, TUNING)
        return not is_urgent(policy, m), m.priority, own, key, m.seq

    for _ in range(2):
        assert list(planner.queue.best_first(MOMENT)) == sorted(others, key=place)
    for m in others[::2]:
        planner.queue.remove(m)
    assert list(planner.queue.best_first(MOMENT)) == sorted(others[1::2], key=place)


@given(policies, priorities, prioritised())
@settings(max_examples=400, deadline=None)
def test_who_gives_way_to_whom(policy, rules, case):
    """To a better rank, if the policy alone would say so or the priority is better by enough."""
    running, others, capacity = case
    plan = planner_under(policy, rules, others).plan(running, capacity, MOMENT)
    assert len(set(plan.pause)) == len(plan.pause)
    if capacity.free_tokens + capacity.releasing_tokens < GROWTH * len(running):
        return  # The next steps do not fit: the worst leave, whoever starts.

    def displaces(starting, victim):
        if is_urgent(policy, starting) != is_urgent(policy, victim):
            return is_urgent(policy, starting)
        if starting.priority > victim.priority:
            return False
        better_by = victim.priority - starting.priority
        enough = rules.preempts and better_by > rules.threshold
        return enough or own_rank(policy, starting) < own_rank(policy, victim)

    assert all(any(displaces(m, victim) for m in plan.start) for victim in plan.pause)


@given(policies, priorities, prioritised())
@settings(max_examples=200, deadline=None)
def test_for_memory_the_worst_give_way(policy, rules, case):
    """Who runs on, and could have been paused, is of no worse rank than who is paused."""
    running, _, capacity = case
    planner = planner_under(policy, rules, [])
    plan = planner.plan(running, capacity, MOMENT)
    place = place_in(planner)
    staying = [m for m in running if m.pausable and m not in plan.pause]
    assert all(place(m) < place(victim) for m in staying for victim in plan.pause)


@given(policies, priorities, situation(), st.sampled_from([-5, 7]))
@settings(max_examples=200, deadline=None)
def test_one_priority_for_all_changes_nothing(policy, rules, case, priority):
    """But for overdue requests, which then go behind urgent answers."""
    running, others, capacity = case
    if policy == "pascal" and OVERDUE in {own_rank(policy, m)[0] for m in others}:
        return
    plain = Planner(POLICIES[policy], TUNING)
    plain.queue.recount(others)
    expected = plain.plan(running, capacity, MOMENT)
    plain.queue.recount([])
    for m in [*running, *others]:
        m.priority = priority
    assert planner_under(policy, rules, others).plan(running, capacity, MOMENT) == expected


def thinker(seq, priority, status=RequestStatus.WAITING, tokens=0):
    return RequestState(
        seq,
        Pacer(TPOT),
        status,
        phase_tokens=tokens,
        total_tokens=tokens,
        kv_tokens=90 if status is RequestStatus.RUNNING else 50,
        since_pass=MOMENT.pass_no,
        priority=priority,
    )


def answer(seq, priority, lead_s, status=RequestStatus.RUNNING):
    pacer = Pacer(TPOT, delivered=5, last_shown=NOW + lead_s)
    return RequestState(seq, pacer, status, Phase.ANSWERING, 5, 50, kv_tokens=90, priority=priority)


@pytest.mark.parametrize(
    ("better_by", "rules", "gives_way"),
    [
        (11, Priorities(), True),
        (10, Priorities(), False),
        (1, Priorities(threshold=0), True),
        (0, Priorities(threshold=0), False),
        (11, Priorities(preempts=False), False),
        (-11, Priorities(threshold=0), False),
    ],
)
def test_the_threshold_is_sglangs(better_by, rules, gives_way):
    """Two thinkers that have run the same: only a priority can displace."""
    runs, waits = thinker(0, better_by, RequestStatus.RUNNING), thinker(1, 0)
    plan = planner_under("pascal", rules, [waits]).plan([runs], Capacity(10, 0, 4), MOMENT)
    if gives_way:
        assert (plan.pause, plan.start) == ((runs,), (waits,))
    else:
        assert plan == Plan(blocked=waits, shortage="rank")


def test_a_priority_that_does_not_preempt_still_takes_what_the_policy_takes():
    """An answer far ahead of its reader gives way to thinking; of worse priority all the more."""
    ahead, waits = answer(0, 1, 90), thinker(1, 0)
    rules = Priorities(preempts=False)
    plan = planner_under("pascal", rules, [waits]).plan([ahead], Capacity(10, 0, 4), MOMENT)
    assert (plan.pause, plan.start) == ((ahead,), (waits,))


def test_victims_of_too_near_a_priority_are_passed_over():
    """Worst first: one below the threshold, one beyond it that runs better, one of the policy's."""
    near = thinker(0, 2, RequestStatus.RUNNING)
    same = thinker(1, 0, RequestStatus.RUNNING, tokens=3 * TUNING.quantum)
    waits = thinker(2, 0)
    rules = Priorities(threshold=5)
    planner = planner_under("pascal", rules, [waits])
    plan = planner.plan([near, same], Capacity(10, 0, 4), MOMENT)
    assert (plan.pause, plan.start) == ((same,), (waits,))


def test_an_urgent_answer_goes_before_every_priority():
    dry = answer(0, 100, 0, RequestStatus.HOST)
    first, other_dry = thinker(1, -100), answer(2, 50, 0, RequestStatus.HOST)
    calm = answer(4, -200, 90, RequestStatus.HOST)
    waiting = [dry, first, other_dry, calm]
    planner = planner_under("pascal", Priorities(preempts=False), waiting)
    assert list(planner.queue.best_first(MOMENT)) == [other_dry, dry, calm, first]
    runs = thinker(3, -100, RequestStatus.RUNNING)
    plan = planner.plan([runs], Capacity(50, 0, 4), MOMENT)
    assert (plan.pause, plan.start) == ((runs,), (other_dry,))


def passes_until_start(low, priority, *, passes, most=1 << 30):
    """Passes until `low` starts beside a stream of short requests of a priority, at most so many;
    room for one. None: it has not started in `passes`."""
    planner = planner_under("pascal", Priorities(threshold=0), [])
    planner.queue.stopped(low, RequestStatus.WAITING, PassInfo(0, NOW, 0.01))
    running, waiting = [], []
    seqs, step = itertools.count(), 8
    for pass_no in range(1, passes, step):
        pass_info = PassInfo(pass_no, NOW, 0.01)
        while len(waiting) < 2 and (seq := next(seqs)) < most:
            waiting.append(RequestState(seq, Pacer(TPOT), kv_tokens=20, priority=priority))
            planner.queue.stopped(waiting[-1], RequestStatus.WAITING, pass_info)
        free = 50 - sum(m.kv_tokens for m in running)
        plan = planner.plan(running, Capacity(free, 0, 4), pass_info)
        if low in plan.start:
            return pass_no
        for m in plan.pause:
            planner.queue.stopped(m, RequestStatus.HOST, pass_info)
        for m in plan.start:
            planner.queue.started(m, pass_info)
        running = [m for m in running if m not in plan.pause] + list(plan.start)
        waiting = [m for m in waiting if planner.queue.holds(m)]
        for m in running:
            m.total_tokens += step
            m.phase_tokens += step
        running = [m for m in running if m.total_tokens < 40]
    return None


def test_ageing_bounds_a_wait_within_a_priority_and_not_across_them():
    """As in SGLang, an endless stream of higher priority keeps a lower one waiting for ever."""
    consumed = 2
    bound = TUNING.ageing * TUNING.quantum * (consumed + TUNING.overdue) + PATIENCE + 200

    def low():
        return RequestState(
            -1,
            Pacer(TPOT),
            phase_tokens=consumed * TUNING.quantum,
            total_tokens=consumed * TUNING.quantum,
            kv_tokens=20,
            priority=5,
        )

    for same_or_worse in (5, 6):
        assert passes_until_start(low(), same_or_worse, passes=bound)
    assert passes_until_start(low(), 4, passes=4 * bound) is None
    waited = passes_until_start(low(), 4, passes=4 * bound, most=100)
    assert 100 * 40 / 2 < waited < 4 * bound, "it starts once they stop coming"


def test_priorities_that_are_gone_leave_nothing_behind():
    planner = planner_under("pascal", Priorities(), [])
    for priority in range(50):
        paused = answer(priority, priority, 90, RequestStatus.HOST)
        planner.queue.add(paused)
        planner.queue.add(thinker(100 + priority, priority))
        assert len(list(planner.queue.best_first(MOMENT))) == priority + 2
        planner.queue.remove(paused)
    assert len(planner.queue._classes) <= 2


def scheduler(**more):
    return SimpleNamespace(
        policy=SimpleNamespace(policy=CacheAwarePolicy.LPM, enable_priority_scheduling=True),
        **{
            "enable_priority_scheduling": True,
            "enable_priority_preemption": True,
            "schedule_low_priority_values_first": False,
            "priority_scheduling_preemption_threshold": 3,
            **more,
        },
    )


@pytest.mark.parametrize(
    ("given", "low_first", "order"),
    [
        ((None, -5, 0, 7), False, (7, 0, -5, None)),
        ((None, -5, 0, 7), True, (-5, 0, 7, None)),
        ((2**63 - 1, -(2**63)), False, (2**63 - 1, -(2**63))),
    ],
)
def test_lower_goes_first_whatever_the_values_of_requests_mean(given, low_first, order):
    live = scheduler(schedule_low_priority_values_first=low_first)
    found = sorted(given, key=lambda p: priority_of(live, SimpleNamespace(priority=p)))
    assert tuple(found) == order


def test_without_priority_scheduling_all_requests_are_alike():
    live = scheduler(enable_priority_scheduling=False, enable_priority_preemption=False)
    assert {priority_of(live, SimpleNamespace(priority=p)) for p in (None, 3, -9)} == {0}
    assert take_over(live, POLICIES["pascal"]) is POLICIES["pascal"]
    assert live.policy.policy is CacheAgnosticPolicy.FCFS


@pytest.mark.parametrize("preempts", [True, False])
def test_sglang_neither_sorts_nor_preempts_beside_the_plan(preempts):
    live = scheduler(enable_priority_preemption=preempts)
    policy = take_over(live, POLICIES["pascal"])
    assert not live.enable_priority_preemption
    assert not live.policy.enable_priority_scheduling
    assert live.enable_priority_scheduling, "its metrics and its queue limit still go by them"
    low, high = (dataclasses.replace(thinker(0, p)) for p in (4, 0))
    ranks = [policy.rank(m, MOMENT, TUNING) for m in (high, low)]
    assert policy.displaces(*ranks) == preempts
