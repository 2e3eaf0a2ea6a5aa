"""Fairness between tenants: the bound holds whatever they send, and without it nothing changes."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.policy import fairness
from pascal_sglang.policy.fairness import LOOK_S, MOST_IDLE, STEPS, TenantCounters, with_fairness
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Capacity, Planner
from pascal_sglang.policy.priorities import Priorities, with_priorities
from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

POOL, PASS_S, BOUND_S = 400, 0.05, 2.0
# A look at these times is never too soon.
EVERY_S = 2 * LOOK_S
TUNING = Tuning(quantum=20, demote=100, headroom=4, stall_s=0.01)
SCHEDULING = sorted(name for name, policy in POLICIES.items() if policy.schedules)


class Engine:
    """A pool, a planner, and tenants each of which always has a request that waits."""

    def __init__(self, policy, lengths, prompts, fair=True):
        self.tenants = TenantCounters(POOL, BOUND_S, lambda r: r.kv_tokens)
        policy = with_fairness(policy, self.tenants) if fair else policy
        self.planner = Planner(policy, TUNING)
        self.lengths, self.prompts = lengths, prompts
        self.running, self.left, self.served = [], {}, [0.0] * len(lengths)
        self.seq = self.passes = 0

    def submit(self, tenant, answers):
        self.seq += 1
        phase = Phase.ANSWERING if answers else Phase.REASONING
        request = RequestState(
            self.seq, Pacer(0.1), phase=phase, kv_tokens=self.prompts[tenant], tenant=str(tenant)
        )
        self.left[request] = self.lengths[tenant]
        request.since_pass, request.since = self.passes, self.passes * PASS_S
        self.planner.queue.add(request)

    def step(self):
        """One pass: plan, and a token for all that run."""
        self.passes += 1
        now = PassInfo(self.passes, self.passes * PASS_S, PASS_S)
        queue = self.planner.queue
        for tenant in range(len(self.lengths)):
            # Enough to fill the pool.
            while queue.tenants[str(tenant)] * self.prompts[tenant] < POOL:
                self.submit(tenant, answers=self.seq % 3 == 0)
        self.tenants.look(self.running, queue, now.now)
        free = POOL - sum(r.kv_tokens for r in self.running)
        plan = self.planner.plan(self.running, Capacity(free, 0, 64), now)
        for request in plan.pause:
            self.running.remove(request)
            queue.stopped(request, RequestStatus.HOST, now)
        for request in plan.start:
            queue.started(request, now)
            self.running.append(request)
        assert sum(r.kv_tokens for r in self.running) <= POOL
        for request in list(self.running):
            self.served[int(request.tenant)] += request.kv_tokens * PASS_S / POOL
            request.kv_tokens += 1
            request.total_tokens += 1
            request.phase_tokens += 1
            if request.phase is Phase.ANSWERING:
                request.pacer.deliver(now.now, 1)
            self.left[request] -= 1
            if not self.left[request]:
                self.running.remove(request)
                del self.left[request]


@given(
    st.sampled_from(SCHEDULING),
    st.lists(st.tuples(st.integers(30, 80), st.integers(10, 60)), min_size=2, max_size=4),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_of_tenants_that_wait_none_gets_ahead_by_more_than_the_bound(name, sizes, prioritised):
    """Whatever the sizes of their requests, the policy, and answers that go first."""
    policy = POLICIES[name]
    if prioritised:
        policy = with_priorities(policy, Priorities())
    engine = Engine(policy, [length for length, _ in sizes], [prompt for _, prompt in sizes])
    for _ in range(300):
        engine.step()
        # One look may come late. What it charges is a sample, without the last pass of a request.
        assert max(engine.served) - min(engine.served) <= BOUND_S + 2 * LOOK_S


def test_without_it_one_tenant_takes_what_it_asks_for():
    """The test above can fail: short requests go before long ones that have run a quantum."""
    engine = Engine(POLICIES["rr"], [10, 200], [40, 40], fair=False)
    for _ in range(300):
        engine.step()
    assert max(engine.served) - min(engine.served) > 2 * BOUND_S


@given(st.sampled_from(SCHEDULING), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_with_one_tenant_plans_are_the_same(name, seed):
    lengths, prompts = [10 + seed, 25, 31], [20, 40 + seed, 9]
    whole, plain = Engine(POLICIES[name], lengths, prompts), None
    plain = Engine(POLICIES[name], lengths, prompts, fair=False)
    whole.tenants.look = lambda *_: None  # Nobody is ever ahead.
    for _ in range(200):
        whole.step()
        plain.step()
        assert [r.seq for r in whole.running] == [r.seq for r in plain.running]


def waiting(queue, tenant, seq):
    request = RequestState(seq, Pacer(0.1), kv_tokens=10, tenant=tenant)
    queue.add(request)
    return request


def running(tenant, kv_tokens):
    return RequestState(0, Pacer(0.1), RequestStatus.RUNNING, kv_tokens=kv_tokens, tenant=tenant)


def counters(queue, *, served=(), until=10.0):
    """Those of tenants that have run alone for some looks, while all of the queue waited."""
    made = TenantCounters(POOL, BOUND_S, lambda r: r.kv_tokens)
    for number in range(int(until / EVERY_S) + 1):
        made.look([running(name, kv) for name, kv in served], queue, number * EVERY_S)
    return made


def test_a_new_tenant_begins_where_the_least_of_those_who_wait_stands():
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    waiting(queue, "old", 1)
    made = counters(queue, served=[("old", POOL)])
    waiting(queue, "new", 2)
    made.look([], queue, 11.0)
    leads = made.describe()["ahead_s"]
    assert leads["new"] == leads["old"]
    assert made.ahead == {}


def test_a_tenant_that_asks_for_little_is_behind_by_the_bound_at_most():
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    waiting(queue, "heavy", 1)
    made = counters(queue, served=[("heavy", POOL), ("light", 1)])
    assert made.describe()["ahead_s"] == {"light": -BOUND_S, "heavy": 0.0}
    assert made.ahead == {"heavy": STEPS}


def test_a_tenant_that_is_ahead_falls_back_by_half_a_step_only():
    """So that it does not come and go with every look."""
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    for seq, name in enumerate("ab"):
        waiting(queue, name, seq)
    made = TenantCounters(POOL, BOUND_S, lambda r: r.kv_tokens)
    seen = []
    for number in range(8):
        # First one has the whole pool, then the other.
        made.look([running("a" if number <= 3 else "b", POOL)], queue, number * EVERY_S)
        seen.append((made._served["a"] - made._served["b"], made.ahead_of("a")))
    up = [(0.0, 0), (0.5, 0), (1.0, 1), (1.5, 1)]
    assert seen == [*up, (1.0, 1), (0.5, 1), (0.0, 0), (-0.5, 0)]


def test_new_tenants_without_end_do_not_keep_one_that_is_ahead_waiting():
    """Each has the whole pool for a second and is gone; the one that is ahead only waits."""
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    waiting(queue, "old", 0)
    made = counters(queue, served=[("old", POOL)], until=1.0)
    seen = []
    for number in range(5, 60):
        name = f"t{number // 4}"
        request = waiting(queue, name, number)
        made.look([running(name, POOL)], queue, number * EVERY_S)
        queue.remove(request)
        seen.append(made.ahead_of("old"))
    assert seen[-8:] == [0] * 8


def test_nothing_is_charged_while_nobody_waits():
    """What nobody else wants costs nobody anything, and does not count later."""
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    request = waiting(queue, "b", 1)
    made = counters(queue, served=[("a", POOL)], until=0.5)
    queue.remove(request)
    made.look([running("a", POOL)], queue, 50.0)
    waiting(queue, "b", 2)
    made.look([running("a", POOL)], queue, 100.0)
    assert made._served["a"] - made._served["b"] == pytest.approx(0.5)
    made.look([running("a", POOL)], queue, 400.0)
    assert made._served["a"] - made._served["b"] == pytest.approx(0.5 + fairness.MOST_S)


def test_idle_tenants_are_forgotten_beyond_a_number():
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    waiting(queue, "here", 0)
    made = TenantCounters(POOL, BOUND_S, lambda r: r.kv_tokens)
    for number in range(3 * MOST_IDLE):
        made.look([running(f"t{number}", 1)], queue, number * EVERY_S)
    assert made.describe()["tenants"] <= MOST_IDLE + 2
    assert f"t{3 * MOST_IDLE - 1}" in made.describe()["ahead_s"]
    assert len(made.ahead) <= 2


def test_the_order_is_by_tenants_ahead_first_then_as_before():
    """It goes before an answer that is about to run dry, and before a better priority."""
    made = TenantCounters(POOL, BOUND_S, lambda r: r.kv_tokens)
    policy = with_fairness(with_priorities(POLICIES["pascal"], Priorities()), made)
    planner, now = Planner(policy, TUNING), PassInfo(10, 1.0, PASS_S)
    urgent = RequestState(
        1, Pacer(0.1), phase=Phase.ANSWERING, kv_tokens=9, tenant="a", priority=-5
    )
    thinkers = [RequestState(n, Pacer(0.1), kv_tokens=9, tenant="b") for n in (2, 3)]
    planner.queue.recount([*thinkers[::-1], urgent])
    assert [r.seq for r in planner.queue.best_first(now)] == [1, 2, 3]
    made.ahead["a"] = 1
    assert [r.seq for r in planner.queue.best_first(now)] == [2, 3, 1]
    one, two = (policy.rank(r, now, TUNING) for r in (thinkers[0], urgent))
    assert policy.displaces(one, two)
    assert not policy.displaces(two, one)


def test_the_queue_counts_tenants_and_says_when_it_ran_empty():
    queue = WaitQueue(POLICIES["pascal"], TUNING)
    requests = [waiting(queue, name, seq) for seq, name in enumerate("aab")]
    assert dict(queue.tenants) == {"a": 2, "b": 1}
    for request in requests:
        queue.remove(request)
        queue.remove(request)
    assert (dict(queue.tenants), queue.emptied) == ({}, 1)


@given(st.sampled_from(SCHEDULING), st.data())
@settings(max_examples=40, deadline=None)
def test_other_numbers_or_another_policy_order_the_same_requests_anew(name, data):
    """As a planner does that has gone by them from the start."""
    planner = Planner(POLICIES["pascal"], TUNING)
    for seq in range(data.draw(st.integers(1, 8))):
        tokens = data.draw(st.integers(0, 300))
        request = RequestState(
            seq,
            Pacer(0.1),
            data.draw(st.sampled_from([RequestStatus.WAITING, RequestStatus.HOST])),
            phase_tokens=tokens,
            total_tokens=tokens,
            kv_tokens=10 + tokens,
            tenant=data.draw(st.sampled_from("ab")),
            since_pass=data.draw(st.integers(0, 900)),
        )
        planner.queue.add(request)
        if data.draw(st.booleans()):
            planner.queue.remove(request)
    present = list(planner.queue.best_first(PassInfo(1000, 50.0, PASS_S)))
    other = dataclasses.replace(TUNING, quantum=data.draw(st.integers(1, 200)), demote=150)
    fresh = Planner(POLICIES[name], other)
    planner.retune(POLICIES[name], other)
    now = PassInfo(1001, 50.1, PASS_S)
    copies = {m.seq: dataclasses.replace(m, ticket=0) for m in present}
    for copy in copies.values():
        fresh.queue.add(copy)
    both = (planner.queue, fresh.queue)
    first, second = ([r.seq for r in queue.best_first(now)] for queue in both)
    assert first == second
    assert planner.queue.counts == fresh.queue.counts
    assert len(planner.queue) == len(copies) == sum(planner.queue.tenants.values())
    pairs = itertools.pairwise(planner.policy.rank(copies[seq], now, other) for seq in first)
    assert all(better <= worse for better, worse in pairs)
