"""An instance under a policy of ours: carries out the plan of `policy.plan`, as the engine does."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pascal_sglang.policy.kv_tier import Costs, Rung
from pascal_sglang.policy.making import GROWTH
from pascal_sglang.policy.plan import PATIENCE, Plan, Planner, Room
from pascal_sglang.policy.ranking import (
    PREFIX_HEAD_START,
    REACTION_PASSES,
    Moment,
    Order,
    is_demoted,
    urgent_at,
)
from pascal_sglang.policy.request import Place
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.rank_forecast import NEVER
from pascal_sglang.sim.request import Job

if TYPE_CHECKING:
    from pascal_sglang.sim.migration import Move, Moves


class Governed(Instance):
    """SGLang under our governor. A pause and the start it makes room for fall into one pass here;
    the engine needs two.

    knows_lengths: requests say how much they will generate, as those of `evals` do.
    """

    def __init__(self, *args: Any, order: Order, knows_lengths: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planner = Planner(order, self.tuning)
        self.costs = Costs(self.cost.copy_s, self.cost.copy_token_s)
        self.knows_lengths = knows_lengths
        self.pauses = dict.fromkeys(Rung, 0)
        self._blocked: Job | None = None
        self._tried_pass = 0
        self._pending = False
        self._hurry: list[tuple[float, int, float, Job]] = []
        self._hurried = 0
        self._waiting_tokens = 0
        self._leaving: list[tuple[Move, Moves]] = []

    def may_prefill(self) -> bool:
        """Prefills and decode steps take turns (`engine.build`)."""
        return not self.prefilled_last or not self.batch

    @property
    def prefill_token_s(self) -> float:
        return self.costs.prefill_token_s or 0.0

    def reserve_steps(self) -> int:
        return GROWTH

    def has_prefilled(self, tokens: int, seconds: float) -> None:
        self.costs.prefilled(tokens, seconds)

    def demoted(self, job: Job) -> bool:
        return is_demoted(job, self.tuning)

    def decide(self) -> None:
        for job in self.inbox:
            self._wait(job)
        self.inbox.clear()
        for move, moves in self._leaving:
            if move.job.move is move and self.lets_go(move.job):
                moves.handed_over(move)
            else:
                moves.cancel(move)
        self._leaving.clear()
        growing = len(self.batch) + len(self.filling)
        short = self.memory.free < GROWTH * growing
        asked = self.stirred or self.again or self.step_by_step
        self.again = False
        if short or (self.planner.line and (asked or self.look <= self.batch.steps)):
            self._plan()
            self._relieve()
        self.stirred = False

    def _plan(self) -> None:
        self._try_in_vain()
        room = Room(self.memory.free, 0, self.cost.slots - len(self.batch) - len(self.filling))
        moment = self.moment
        plan = self.planner.plan(self.batch, room, moment, len(self.filling))
        self._note(plan)
        for member in plan.pause:
            assert isinstance(member, Job)
            self.pause(member, Rung.RESIDENT if member in plan.park else None)
        for member in plan.spill:
            assert isinstance(member, Job)
            self._spill(member)
        may_prefill = self.may_prefill()
        unfilled = sum(job.unfilled for job in self.filling)
        for member in plan.start:
            assert isinstance(member, Job)
            if member.place is not Place.WAITING:
                self._resume(member)
            elif may_prefill and unfilled < self.cost.chunk and self._fits(member):
                self._admit(member)
                unfilled += member.unfilled

    def _try_in_vain(self) -> None:
        """Who is blocked was tried again in the passes that were jumped over, to no avail; that
        decides when the planner tries next."""
        if self._blocked is None:
            return
        passed = self.passes.count - self._tried_pass
        self._tried_pass += max(0, passed - 1) // PATIENCE * PATIENCE
        self.planner.gave_up_on(self._blocked, Moment(self._tried_pass, 0.0, 0.0))

    def _note(self, plan: Plan) -> None:
        """Keep track of whether displacement was tried for the best who is blocked, as the planner
        does: it does not try again before `PATIENCE` passes are over."""
        blocked = plan.blocked
        assert blocked is None or isinstance(blocked, Job)
        self._pending = False
        # What a plan keeps free for those it starts, and what it takes from those it pauses, is
        # there for others a pass later.
        self.again = bool(plan.start or plan.pause or plan.spill)
        if blocked is None or blocked in plan.spill:
            return
        if blocked is not self._blocked or self.passes.count >= self._tried_pass + PATIENCE:
            self._blocked, self._tried_pass = blocked, self.passes.count
        else:
            self._pending = True

    def next_look(self) -> int:
        """Who is paused may get in a hurry, who waits may have waited long enough, and what could
        not be tried may be tried again."""
        step = NEVER
        if not self.planner.line:
            return step
        batch = self.batch
        if self._pending:
            step = batch.steps + self._tried_pass + PATIENCE - self.passes.count
        blocked = self._blocked
        if self.foresight.paced and blocked is not None and self.planner.line.holds(blocked):
            age = self.tuning.ageing * self.tuning.quantum
            waited = self.passes.count - blocked.since_pass + blocked.head_start
            step = min(step, batch.steps + age - waited % age)
        hurry = self._hurry
        while hurry:
            at, _, since, job = hurry[0]
            if job.place is Place.RUNNING or job.since != since or not self.planner.line.holds(job):
                heapq.heappop(hurry)
                continue
            when = at - REACTION_PASSES * self.passes.mean_s
            if when < self.clock.now:
                heapq.heappop(hurry)
                return batch.steps
            step = min(step, batch.steps_by(when) + 1)
            break
        return step

    def _wait(self, job: Job) -> None:
        job.place = Place.WAITING
        job.kv_tokens = job.prompt + job.total_tokens
        job.cached = self._cached(job)
        job.head_start = PREFIX_HEAD_START * job.cached // job.kv_tokens
        self._stop(job, Place.WAITING)

    def _cached(self, job: Job) -> int:
        return job.history if job.history and self.memory.knows(job.talk) else 0

    def _stop(self, job: Job, place: Place) -> None:
        if self.knows_lengths:
            job.remaining = job.left
        if place is Place.WAITING:
            self._waiting_tokens += job.kv_tokens
        self.planner.stopped(job, place, self.moment)
        if self.foresight.paced and job.phase is Phase.ANSWERING and job.pacer.delivered:
            self._hurried += 1
            at = urgent_at(job, self.tuning)
            heapq.heappush(self._hurry, (at, self._hurried, job.since, job))

    def pause(self, job: Job, rung: Rung | None) -> None:
        """Take a running job out; without a rung its KV leaves the device by the cheapest."""
        self.leave(job)
        job.pauses += 1
        tokens = job.kv_tokens = job.held
        rung = rung or self.costs.cheapest(tokens, self.cost.host - self.memory.host)
        self.pauses[rung] += 1
        if rung is Rung.RESIDENT:
            self._stop(job, Place.RESIDENT)
        else:
            self._off_device(job, rung)
            self._stop(job, job.place)

    def _off_device(self, job: Job, rung: Rung) -> None:
        tokens = job.kv_tokens
        if rung is Rung.HOST:
            self.memory.to_host(tokens)
            self._hold_s += self.cost.copy(tokens)
            job.place = Place.HOST
            return
        self.memory.give(tokens)
        job.kv_tokens = job.prompt + job.total_tokens
        job.cached = 0
        job.place = Place.WAITING

    def _spill(self, job: Job) -> None:
        rung = self.costs.cheapest(job.kv_tokens, self.cost.host - self.memory.host)
        self.pauses[rung] += 1
        self.planner.left(job)
        self._off_device(job, rung)
        if job.place is Place.WAITING:
            self._waiting_tokens += job.kv_tokens
        self.planner.spilled(job, job.place)

    def _fits(self, job: Job) -> bool:
        """An idle instance is asked to try whoever is first."""
        return job.kv_tokens <= self.memory.free

    def _resume(self, job: Job) -> None:
        if job.place is Place.HOST:
            if not self._fits(job):
                return
            self.memory.from_host(job.kv_tokens)
            self._hold_s += self.cost.copy(job.kv_tokens)
        self.planner.started(job, self.moment)
        self.join(job)
        self.watch(job)

    def _admit(self, job: Job) -> None:
        if job.cached and not self.memory.recall(job.talk):
            job.cached = 0
        self._waiting_tokens -= job.kv_tokens
        self.memory.take(job.kv_tokens)
        job.unfilled = job.kv_tokens - job.cached
        self.recomputed_tokens += job.kv_tokens if job.total_tokens else 0
        self.planner.started(job, self.moment)
        self.filling.append(job)

    def _relieve(self) -> None:
        """What the plan leaves that does not fit the next step gives way (`Governor.relieve`)."""
        if self.memory.free >= len(self.batch):
            return
        for member in self.planner.parked_worst_first(self.moment):
            assert isinstance(member, Job)
            self._spill(member)
            if self.memory.free >= len(self.batch):
                return
        members: Sequence[Job] = self.batch
        for member in self.planner.victims.worst_first(members, self.moment):
            if len(self.batch) == 1 or self.memory.free >= len(self.batch):
                return
            assert isinstance(member, Job)
            self.pause(member, None)

    def waiting(self) -> tuple[int, int, int]:
        counts, lane = self.planner.line.counts, self.planner.order.thinking_lane
        thinking = sum(n for (lane_of, _), n in counts.items() if lane_of == lane)
        arrived = sum(job.prompt for job in self.inbox)
        everybody = sum(counts.values()) + len(self.inbox) + len(self.filling)
        return thinking + len(self.inbox), everybody, self._waiting_tokens + arrived

    def takes_over(self, job: Job) -> None:
        """A request has moved here with its KV; where that does not fit any more it waits in host
        memory."""
        self.answers_here(job)
        job.kv_tokens = job.held
        if job.kv_tokens + len(self.batch) <= self.memory.free:
            self.memory.take(job.kv_tokens)
            self._stop(job, Place.RESIDENT)
        else:
            self.memory.host += job.kv_tokens
            self._stop(job, Place.HOST)
        self.poke()

    def takes_back(self, job: Job) -> None:
        """A request that had stopped to move stays."""
        job.kv_tokens = job.held
        self._stop(job, Place.RESIDENT)
        self.poke()

    def hand_over(self, move: Move, moves: Moves) -> None:
        """Let go of a moving request at the next boundary between two passes."""
        self._leaving.append((move, moves))
        self.poke()

    def lets_go(self, job: Job) -> bool:
        """A request moves away with its KV; False if it has none any more."""
        if job in self.filling or (job.place is Place.RUNNING and job not in self.batch):
            return False
        if job in self.batch:
            self.leave(job)
            self.memory.give(job.held)
        elif job.place is Place.WAITING:
            return False
        else:
            self.planner.left(job)
            if job.place is Place.HOST:
                self.memory.leave_host(job.kv_tokens)
            else:
                self.memory.give(job.kv_tokens)
        self.forget(job)
        return True
