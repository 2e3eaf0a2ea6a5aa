"""The policy's queue is SGLang's, whatever SGLang does inside its own prefill step."""

from types import SimpleNamespace

import pytest

from pascal_sglang.engine.admission import Admission
from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Planner
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import RequestState, RequestStatus

MOMENT = PassInfo(1, 1.0, 0.01)


class Request(SimpleNamespace):
    __hash__ = object.__hash__


class World:
    """Four requests in both queues, of which the plan admits the second and the first."""

    def __init__(self):
        pools = dict.fromkeys(("req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache"))
        self.scheduler = SimpleNamespace(waiting_queue=[], **pools)
        self.paused_requests = PausedRequests(self.scheduler, None, Costs())
        self.planner = Planner(POLICIES["pascal"], Tuning())
        self.admission = Admission(
            scheduler=self.scheduler,
            paused_requests=self.paused_requests,
            queue=self.planner.queue,
        )
        self.started = []
        self.requests = [self.request(seq) for seq in range(4)]
        for request in self.requests:
            self.enqueue(request)
        self.admission.plan = self.requests[1::-1]

    def request(self, seq):
        return Request(rid=str(seq), pascal_state=RequestState(seq, Pacer(0.1), kv_tokens=10))

    def enqueue(self, request):
        """As `Scheduler._add_request_to_queue` does."""
        with self.admission.everybody():
            self.scheduler.waiting_queue.append(request)
            self.planner.queue.stopped(state_of(request), RequestStatus.WAITING, MOMENT)

    def remove(self, request):
        """As an abort, or `--max-queued-requests` with priorities."""
        with self.admission.everybody():
            self.scheduler.waiting_queue.remove(request)
            self.planner.queue.remove(state_of(request))

    def take(self, request):
        """As the end of SGLang's prefill step."""
        queue = self.scheduler.waiting_queue
        self.scheduler.waiting_queue = [r for r in queue if r is not request]

    def start(self, request):
        self.started.append(request)
        self.planner.queue.started(state_of(request), MOMENT)

    @property
    def is_true(self):
        return self.admission.is_true(thorough=False) and self.admission.is_true(thorough=True)


@pytest.fixture
def world():
    return World()


def test_the_step_sees_the_plan_in_its_order_and_the_others_stay(world):
    first, second, *others = world.requests
    with world.admission.only_planned(world.start):
        assert world.scheduler.waiting_queue == [second, first]
        world.take(second)
    assert world.scheduler.waiting_queue == [first, *others]
    assert world.started == [second]
    assert world.is_true


def test_what_is_queued_inside_the_step_waits_for_the_next_plan(world):
    """A compiled grammar before anybody is taken, a preempted request after it."""
    first, second, *others = world.requests
    grammar, preempted = world.request(4), world.request(5)
    with world.admission.only_planned(world.start):
        world.enqueue(grammar)
        assert world.scheduler.waiting_queue == [second, first]
        world.take(second)
        world.enqueue(preempted)
    assert world.scheduler.waiting_queue == [first, *others, grammar, preempted]
    assert world.started == [second]
    assert world.is_true


def test_a_request_removed_inside_the_step_has_not_started(world):
    first, second, third, fourth = world.requests
    with world.admission.only_planned(world.start):
        world.remove(first)
        world.remove(fourth)
        assert world.scheduler.waiting_queue == [second]
    assert world.scheduler.waiting_queue == [second, third]
    assert world.started == []
    assert world.is_true


def test_an_error_in_the_step_loses_nobody(world):
    def fail():
        with world.admission.only_planned(world.start):
            world.take(world.requests[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(world.scheduler.waiting_queue) == set(world.requests) - {world.requests[1]}
    assert world.is_true


def test_a_ghost_and_a_stranger_are_seen_and_mended(world):
    ghost, stranger = world.requests[0], world.request(4)
    world.take(ghost)
    assert not world.admission.is_true(thorough=False)
    world.scheduler.waiting_queue.append(stranger)
    assert world.admission.is_true(thorough=False), "one too many and one too few"
    assert not world.admission.is_true(thorough=True)
    world.admission.check(thorough=False)
    assert (world.admission.errors, world.is_true) == (0, False)
    world.admission.check(thorough=True)
    assert (world.admission.errors, world.is_true) == (1, True)


def test_paused_requests_are_in_the_policys_queue_alone(world):
    paused, leaving = world.request(4), world.request(5)
    for request in (paused, leaving):
        world.paused_requests._enter(request, PauseStatus.HOST)
    world.paused_requests.begin_migration(leaving)
    assert not world.admission.is_true(thorough=False)
    world.planner.queue.stopped(state_of(paused), RequestStatus.HOST, MOMENT)
    assert world.is_true
    world.paused_requests._enter(paused, PauseStatus.RESIDENT)
    assert world.admission.is_true(thorough=False)
    assert not world.admission.is_true(thorough=True), "its KV is elsewhere"
    world.admission.check(thorough=True)
    assert world.is_true
    assert state_of(paused).status is RequestStatus.RESIDENT
    assert sum(world.planner.queue.counts.values()) == 5
