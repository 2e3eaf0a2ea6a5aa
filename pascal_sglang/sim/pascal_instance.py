"""An instance under a policy of ours: carries out the plan of `policy.plan`, as the engine does."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from pascal_sglang.policy.fairness import TenantCounters, with_fairness
from pascal_sglang.policy.kv_tier import Costs, KVTier
from pascal_sglang.policy.plan import GROWTH, PATIENCE, Capacity, Plan, Planner, room_to_grow
from pascal_sglang.policy.rank_forecast import NEVER
from pascal_sglang.policy.ranking import (
    PREFIX_HEAD_START,
    REACTION_PASSES,
    Rank,
    credit_of,
    has_pace,
    is_demoted,
    overdue_at,
    urgent_at,
)
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.relief import giving_way
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.request import SimRequest


def costs_of(cost: Cost) -> Costs:
    """What the policy is told of copies here."""
    launch_s = cost.copy_launch_s if cost.copies_beside else None
    return Costs(cost.copy_s, cost.copy_token_s, launch_s=launch_s)


def held_tokens(request: RequestState) -> int:
    """KV entries that a running request has."""
    assert isinstance(request, SimRequest)
    return request.held


class PascalInstance(Instance):
    """SGLang under our executor. A pause whose copy the engine waits for and the start that it
    makes room for fall into one pass here; the engine needs two.

    Where copies run beside the decoding (`Cost.copies_beside`), the memory of a paused request is
    free in the first pass after its copy, and a request that comes back joins the first pass after
    its own. The engine still waits where memory has to be free at once: for requests that were
    paused with their KV on the device, and for a step that does not fit.

    copying: paused requests whose KV leaves the device; arriving: requests whose KV comes back;
    both with the time (s) at which the copy ends. fair: tenants are told apart. knows_lengths:
    requests say how much they will generate, as those of `evals` do.
    """

    def __init__(
        self, *args: Any, policy: Policy, knows_lengths: bool, fair: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tenants: TenantCounters | None = None
        if fair:
            bound_s = self.tuning.tenant_bound
            self.tenants = TenantCounters(self.cost.capacity, bound_s, held_tokens)
            policy = with_fairness(policy, self.tenants)
        self.planner = Planner(policy, self.tuning)
        self.costs = costs_of(self.cost)
        self.knows_lengths = knows_lengths
        self.pauses = dict.fromkeys(KVTier, 0)
        self._blocked: tuple[SimRequest, Rank] | None = None
        self._tried_pass = 0
        self._pending = False
        self._hurry: list[tuple[float, int, float, SimRequest]] = []
        self._overdue: list[tuple[float, int, float, SimRequest]] = []
        self._hurried = 0
        self._waiting_tokens = 0
        self.copying: dict[SimRequest, float] = {}
        self.arriving: dict[SimRequest, float] = {}
        self._copies_end = 0.0
        self._leaving: list[tuple[SimRequest, object, Callable[[bool], None]]] = []

    def may_prefill(self) -> bool:
        """Prefills and decode steps take turns (`engine.build`)."""
        return not self.prefilled_last or not self.batch

    @property
    def prefill_token_s(self) -> float:
        return self.costs.prefill_token_s or 0.0

    def reserve_steps(self) -> int:
        return GROWTH

    def joining(self) -> int:
        return len(self.arriving)

    def has_prefilled(self, tokens: int, seconds: float) -> None:
        self.costs.prefilled(tokens, seconds)

    def demoted(self, request: SimRequest) -> bool:
        return is_demoted(request, self.tuning)

    def decide(self) -> None:
        for request in self.inbox:
            self._wait(request)
        self.inbox.clear()
        for request, migration, handed_over in self._leaving:
            handed_over(request.migration is migration and self.lets_go(request))
        self._leaving.clear()
        if self.copying or self.arriving:
            self._end_copies(self.clock.now)
        if self.tenants is not None:
            self.tenants.look(self.batch, self.planner.queue, self.clock.now)
        growing = len(self.batch) + len(self.filling) + len(self.arriving)
        short = self.memory.free < room_to_grow(growing)
        asked = self.stirred or self.again or self.step_by_step
        self.again = False
        if short or (self.planner.queue and (asked or self.look <= self.batch.steps)):
            self._plan()
            self._relieve()
        self.stirred = False

    def _plan(self) -> None:
        self._try_in_vain()
        joining = len(self.filling) + len(self.arriving)
        capacity = Capacity(
            self.memory.free,
            sum(request.kv_tokens for request in self.copying),
            self.cost.slots - len(self.batch) - joining,
        )
        pass_info = self.pass_info
        plan = self.planner.plan(self.batch, capacity, pass_info, joining)
        self._note(plan)
        for request in plan.pause:
            assert isinstance(request, SimRequest)
            self.pause(request, KVTier.RESIDENT if request in plan.park else None)
        for request in plan.spill:
            assert isinstance(request, SimRequest)
            self._spill(request)
        may_prefill = self.may_prefill()
        unfilled = sum(request.unfilled for request in self.filling)
        for request in plan.start:
            assert isinstance(request, SimRequest)
            if request.status is not RequestStatus.WAITING:
                self._resume(request)
            elif may_prefill and unfilled < self.cost.chunk and self._fits(request):
                self._admit(request)
                unfilled += request.unfilled

    def _try_in_vain(self) -> None:
        """Who is blocked was tried again in the passes that were jumped over, to no avail; that
        decides when the planner tries next."""
        if self._blocked is None:
            return
        passed = self.passes.count - self._tried_pass
        self._tried_pass += max(0, passed - 1) // PATIENCE * PATIENCE
        self.planner.gave_up_on(*self._blocked, self._tried_pass, self.planner.lacked)

    def _note(self, plan: Plan) -> None:
        """Keep track of whether displacement was tried for the best who is blocked, as the planner
        does: it does not try again before `PATIENCE` passes are over."""
        blocked = plan.blocked
        assert blocked is None or isinstance(blocked, SimRequest)
        self._pending = False
        # What a plan keeps free for those it starts, and what it takes from those it pauses, is
        # there for others a pass later.
        self.again = bool(plan.start or plan.pause or plan.spill)
        if blocked is None or blocked in plan.spill:
            return
        tried = (blocked, self.planner.policy.rank(blocked, self.pass_info, self.tuning))
        if tried != self._blocked or self.passes.count >= self._tried_pass + PATIENCE:
            self._blocked, self._tried_pass = tried, self.passes.count
        else:
            self._pending = True

    def next_look(self) -> int:
        """A paused answer may get in a hurry, a waiting thinker may be forgiven a quantum or be
        overdue, and what could not be tried may be tried again."""
        step = NEVER
        if not self.planner.queue:
            return step
        batch = self.batch
        if self.tenants is not None:
            step = batch.steps_by(self.tenants.looks_at(self.clock.now)) + 1
        if self._pending:
            step = min(step, batch.steps + self._tried_pass + PATIENCE - self.passes.count)
        blocked = None if self._blocked is None else self._blocked[0]
        if self.forecast.paced and blocked is not None and self.planner.queue.holds(blocked):
            age = self.tuning.ageing * self.tuning.quantum
            waited = self.passes.count - blocked.since_pass + blocked.head_start
            step = min(step, batch.steps + age - waited % age)
        hurry = self._hurry
        if self._first_waits(hurry):
            at, mean_s = hurry[0][0], self.passes.mean_s
            if at - REACTION_PASSES * mean_s < self.clock.now:
                heapq.heappop(hurry)
                return batch.steps
            # The mean gets longer meanwhile, but no longer than the last of these steps.
            ahead = batch.steps_by(at) - batch.steps
            longest_s = batch.step_s + ahead * batch.cost.kv_token_s * len(batch)
            when = at - REACTION_PASSES * max(mean_s, longest_s)
            step = min(step, batch.steps_by(when) + 1)
        if self._first_waits(self._overdue):
            at = int(self._overdue[0][0])
            if at <= self.passes.count:
                heapq.heappop(self._overdue)
                return batch.steps
            step = min(step, batch.steps + at - self.passes.count)
        return step

    def _first_waits(self, due: list[tuple[float, int, float, SimRequest]]) -> bool:
        """Drop from the top of `due` the requests that have run since; whether one is left."""
        while due:
            _, _, since, request = due[0]
            if (
                request.status is not RequestStatus.RUNNING
                and request.since == since
                and self.planner.queue.holds(request)
            ):
                return True
            heapq.heappop(due)
        return False

    def _wait(self, request: SimRequest) -> None:
        request.status = RequestStatus.WAITING
        request.kv_tokens = request.prompt + request.total_tokens
        request.cached = self._cached(request)
        request.head_start = PREFIX_HEAD_START * request.cached // request.kv_tokens
        self._stop(request, RequestStatus.WAITING)

    def _cached(self, request: SimRequest) -> int:
        return request.history if request.history and self.memory.knows(request.talk) else 0

    def _stop(self, request: SimRequest, status: RequestStatus) -> None:
        if self.knows_lengths:
            request.remaining = request.left
        if status is RequestStatus.WAITING:
            self._waiting_tokens += request.kv_tokens
        self.planner.queue.stopped(request, status, self.pass_info)
        if not self.forecast.paced:
            return
        self._hurried += 1
        if not has_pace(request):
            at = overdue_at(request, self.tuning)
            heapq.heappush(self._overdue, (at, self._hurried, request.since, request))
        elif request.pacer.delivered:
            at = urgent_at(request, self.tuning)
            heapq.heappush(self._hurry, (at, self._hurried, request.since, request))

    def pause(
        self, request: SimRequest, tier: KVTier | None, *, beside: bool | None = None
    ) -> None:
        """Take a running job out; without a tier its KV leaves the device by the cheapest. beside:
        whether its copy may run beside the decoding; if unsaid, where copies can."""
        # Before its status changes: credit lasts while a request runs its quantum.
        request.credit = credit_of(request, self.tuning)
        self.leave(request)
        request.pauses += 1
        tokens = request.kv_tokens = request.held
        tier = tier or self.costs.cheapest(tokens, self.cost.host - self.memory.host)
        self.pauses[tier] += 1
        if tier is KVTier.RESIDENT:
            self._stop(request, RequestStatus.RESIDENT)
        elif tier is KVTier.HOST and (self.cost.copies_beside if beside is None else beside):
            request.status = RequestStatus.HOST
            self.memory.copy_to_host(tokens)
            self.copying[request] = self._copy_beside(tokens)
        else:
            self._off_device(request, tier)
            self._stop(request, request.status)

    def _copy_beside(self, tokens: int) -> float:
        """Launch a copy behind those under way; when it ends."""
        self._hold_s += self.cost.copy_launch_s
        begins = max(self._copies_end, self.clock.now + self._hold_s)
        self._copies_end = begins + self.cost.copy(tokens)
        self.clock.at(self._copies_end, self._copy_ended)
        return self._copies_end

    def _copy_ended(self, _: object) -> None:
        self.poke()

    def _end_copies(self, now: float) -> None:
        """Take in the copies that have ended by `now`."""
        for request in [r for r, end in self.copying.items() if end <= now]:
            del self.copying[request]
            self.memory.give(request.kv_tokens)
            self._stop(request, RequestStatus.HOST)
        for request in [r for r, end in self.arriving.items() if end <= now]:
            del self.arriving[request]
            self.join(request)
            self.watch(request)

    def _off_device(self, request: SimRequest, tier: KVTier) -> None:
        """The engine waits until the KV has left the device."""
        tokens = request.kv_tokens
        if tier is KVTier.HOST:
            self.memory.to_host(tokens)
            self._await_copies(self._copies_end)
            self._hold_s += self.cost.copy(tokens)
            self._copies_end = max(self._copies_end, self.clock.now + self._hold_s)
            request.status = RequestStatus.HOST
            return
        self.memory.give(tokens)
        request.kv_tokens = request.prompt + request.total_tokens
        request.cached = 0
        request.status = RequestStatus.WAITING

    def _spill(self, request: SimRequest) -> None:
        tier = self.costs.cheapest(request.kv_tokens, self.cost.host - self.memory.host)
        self.pauses[tier] += 1
        self.planner.queue.remove(request)
        self._off_device(request, tier)
        if request.status is RequestStatus.WAITING:
            self._waiting_tokens += request.kv_tokens
        self.planner.queue.spilled(request, request.status)

    def _await_copies(self, end: float) -> None:
        """The next pass does not begin before `end`."""
        self._hold_s = max(self._hold_s, end - self.clock.now)

    def _fits(self, request: SimRequest) -> bool:
        """An idle instance is asked to try whoever is first, and some of what a plan gives away is
        still being copied."""
        keep = len(self.batch) + len(self.arriving) if self.copying else 0
        return request.kv_tokens + keep <= self.memory.free

    def _resume(self, request: SimRequest) -> None:
        if request.status is RequestStatus.HOST:
            if not self._fits(request):
                return
            self.memory.from_host(request.kv_tokens)
            if self.cost.copies_beside:
                self.planner.queue.started(request, self.pass_info)
                self.arriving[request] = self._copy_beside(request.kv_tokens)
                return
            self._hold_s += self.cost.copy(request.kv_tokens)
        self.planner.queue.started(request, self.pass_info)
        self.join(request)
        self.watch(request)

    def _admit(self, request: SimRequest) -> None:
        if request.cached and not self.memory.recall(request.talk):
            request.cached = 0
        self._waiting_tokens -= request.kv_tokens
        self.memory.take(request.kv_tokens)
        request.unfilled = request.kv_tokens - request.cached
        self.recomputed_tokens += request.kv_tokens if request.total_tokens else 0
        self.planner.queue.started(request, self.pass_info)
        self.filling.append(request)

    def _relieve(self) -> None:
        """Requests that do not fit the next step give way (`PlanExecutor.relieve`)."""
        if self.memory.free >= len(self.batch):
            return
        if self.copying:
            last = max(self.copying.values())
            self._await_copies(last)
            self._end_copies(last)
            if self.memory.free >= len(self.batch):
                return
        requests: Sequence[SimRequest] = self.batch
        for request in giving_way(self.planner, requests, self.pass_info):
            assert isinstance(request, SimRequest)
            if request.status is RequestStatus.RESIDENT:
                self._spill(request)
            elif len(self.batch) > 1:
                self.pause(request, None, beside=False)
            else:
                return
            if self.memory.free >= len(self.batch):
                return

    def waiting(self) -> tuple[int, int, int]:
        counts, priority_class = self.planner.queue.counts, self.planner.policy.reasoning_class
        thinking = sum(n for (lane_of, _), n in counts.items() if lane_of == priority_class)
        arrived = sum(request.prompt for request in self.inbox)
        copied = [*self.copying, *self.arriving]
        thinking += sum(request.phase is Phase.REASONING for request in copied)
        everybody = sum(counts.values()) + len(self.inbox) + len(self.filling) + len(copied)
        return thinking + len(self.inbox), everybody, self._waiting_tokens + arrived

    def takes_over(self, request: SimRequest) -> None:
        """A request has moved here with its KV; where that does not fit any more it waits in host
        memory."""
        self.answers_here(request)
        request.kv_tokens = request.held
        if request.kv_tokens + len(self.batch) <= self.memory.free:
            self.memory.take(request.kv_tokens)
            self._stop(request, RequestStatus.RESIDENT)
        else:
            self.memory.host += request.kv_tokens
            self._stop(request, RequestStatus.HOST)
        self.poke()

    def takes_back(self, request: SimRequest) -> None:
        """A request that had stopped to move stays."""
        request.kv_tokens = request.held
        self._stop(request, RequestStatus.RESIDENT)
        self.poke()

    def hand_over(
        self, request: SimRequest, migration: object, handed_over: Callable[[bool], None]
    ) -> None:
        """Let go of a moving request at the next boundary between two passes.

        handed_over: called then, with whether the request left; it stays if its `migration` is over
        or its KV is gone.
        """
        self._leaving.append((request, migration, handed_over))
        self.poke()

    def lets_go(self, request: SimRequest) -> bool:
        """A request moves away with its KV; False if it has none any more."""
        if (
            request in self.filling
            or request in self.copying
            or (request.status is RequestStatus.RUNNING and request not in self.batch)
        ):
            return False
        if request in self.batch:
            self.leave(request)
            self.memory.give(request.held)
        elif request.status is RequestStatus.WAITING:
            return False
        else:
            self.planner.queue.remove(request)
            if request.status is RequestStatus.HOST:
                self.memory.leave_host(request.kv_tokens)
            else:
                self.memory.give(request.kv_tokens)
        self.forget(request)
        return True
