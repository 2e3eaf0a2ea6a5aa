"""Carries out the policy's plan on a live scheduler, one pass at a time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang import clock
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.admission import Admission
from pascal_sglang.engine.capacity import CapacityView
from pascal_sglang.engine.chaos import Chaos
from pascal_sglang.engine.forecasts import Forecasts
from pascal_sglang.engine.kv.drafts import step_tokens, taken_ahead
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.tool_kv import ToolKV
from pascal_sglang.engine.lora_slots import LoraSlots
from pascal_sglang.engine.observability.decision_log import DecisionLog
from pascal_sglang.engine.observability.metrics import ToolMetrics
from pascal_sglang.engine.observability.phases import PhaseTracker
from pascal_sglang.engine.observability.queue_times import longest_waits
from pascal_sglang.engine.pipeline import Pipeline
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import (
    ERRORS_LOGGED,
    catch_on_all_ranks,
    is_alone,
    least,
    own_word,
)
from pascal_sglang.policy.fairness import TenantCounters, with_fairness
from pascal_sglang.policy.kv_tier import TYPICAL_QUANTA, Costs, KVTier
from pascal_sglang.policy.plan import KVAccounting, Plan, Planner
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.relief import giving_way
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.running_mean import LONGEST_PASS_S, running_mean
from pascal_sglang.support import EVERYTHING, Level, Support

if TYPE_CHECKING:
    from pascal_sglang.engine.migration.manager import Migrations

logger = logging.getLogger(__name__)

# Seconds between two updates of the metrics that every pass changes.
REPORT_S = 0.1
# And between two that go through the whole queue.
REPORT_WAITS_S = 1.0


def tuning_of(config: PascalConfig, costs: Costs) -> Tuning:
    """The policy's numbers under a configuration, on a machine with these costs."""
    tuning = Tuning(
        quantum=config.quantum_tokens,
        demote=config.demote_tokens,
        demote_on=config.demote_on,
    )
    tuning = dataclasses.replace(tuning, settle=config.answer_bias * tuning.settle)
    stall_s = costs.stall_s(TYPICAL_QUANTA * config.quantum_tokens)
    return tuning if stall_s is None else dataclasses.replace(tuning, stall_s=stall_s)


class PlanExecutor:
    """Asks the policy for a plan in every pass, and carries it out.

    Every decision is a function of the request stream, the KV pool and the clock of TP rank 0, so
    all TP ranks decide alike.
    """

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        config: PascalConfig,
        policy: Policy,
        copies: HostCopies,
        costs: Costs,
        support: Support = EVERYTHING,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.scheduler = scheduler
        # What features leave of pauses; whether requests move is the business of `Migrations`.
        self.support = support
        self.paused_requests = PausedRequests(scheduler, copies, costs)
        self.pool = self.paused_requests.pool
        self.lora_slots = LoraSlots(scheduler=scheduler, paused_requests=self.paused_requests)
        self.capacity = CapacityView(
            scheduler=scheduler,
            paused_requests=self.paused_requests,
            pool=self.pool,
            counts_kv=support.level >= Level.RECOMPUTE,
            lora_slots=self.lora_slots,
            step_tokens=step_tokens(scheduler),
            taken_ahead=taken_ahead(scheduler),
        )
        tuning = tuning_of(config, costs)
        accounting = KVAccounting(
            self.capacity.required,
            self.capacity.reclaimable,
            self.capacity.states_required,
            self.capacity.states_reclaimable,
            self.capacity.windows_required,
            self.capacity.windows_reclaimable,
            self.capacity.adapter_fits,
        )
        # The policy as it is without tenants.
        self.policy = policy
        self.tenants: TenantCounters | None = None
        policy = self._policy_of(config, tuning)
        self.planner = Planner(policy, tuning, accounting, self.capacity.step_tokens)
        self.admission = Admission(
            scheduler=scheduler, paused_requests=self.paused_requests, queue=self.planner.queue
        )
        self.decision_log = DecisionLog(policy, tuning, log=config.log_decisions)
        self.request_states = RequestStates(
            scheduler, config, self.paused_requests, self.planner.queue, self.decision_log, support
        )
        # Mean number of running requests over the passes of `pass_info.pass_s`.
        self.batch = 0.0
        self.errors = 0
        # Seconds that planning and pausing have taken; observing the requests is timed where it is
        # done.
        self.policy_s = 0.0
        self.phase_tracker: PhaseTracker | None = None
        self.migrations: Migrations | None = None
        self.forecasts: Forecasts | None = None
        # None where no KV is kept for conversations that wait for a tool.
        self.tool_kv: ToolKV | None = None
        self.tool_metrics: ToolMetrics | None = None
        self._chaos = Chaos(config.chaos) if config.chaos else None
        self._extended_before = 0
        self._reported = self._reported_waits = 0.0
        self._alone = is_alone(scheduler)
        self.pipeline = pipeline or Pipeline(scheduler)
        # The micro-batch that a pass of several is at, and the clock when it began.
        self._turn = 0
        self._pass_began = 0.0

    def reconfigure(self, config: PascalConfig) -> None:
        """Go by another configuration from this pass on; it differs in what may change while
        serving."""
        self.request_states.config = config
        tuning = tuning_of(config, self.paused_requests.costs)
        policy = self._policy_of(config, tuning)
        self.planner.retune(policy, tuning)
        self.decision_log.retune(policy, tuning, log=config.log_decisions)
        if self.forecasts is not None:
            self.forecasts.retune(tuning, config, self.tenants)

    def _policy_of(self, config: PascalConfig, tuning: Tuning) -> Policy:
        """The policy, with fairness between tenants where that is asked for."""
        if config.fairness == "off":
            self.tenants = None
            return self.policy
        if self.tenants is None:
            pool = self.scheduler.max_total_num_tokens
            self.tenants = TenantCounters(pool, tuning.tenant_bound, held_tokens)
        return with_fairness(self.policy, self.tenants)

    def govern(self, running: ScheduleBatch, last: ScheduleBatch | None) -> ScheduleBatch:
        """Begin a pass. An error of ours is logged and counted, and SGLang's order stands in.
        Raises: RanksDiverged if it is not the same on all TP ranks."""
        begin = clock.now()
        now = self._meet()
        self._tick(now, running, last)
        if not self._alone:
            begin = clock.now()  # Waiting for the other ranks is no cost of the policy.
        self._running = running  # With all who come back: an error must not lose them.
        error = catch_on_all_ranks(self.scheduler, lambda: self._carry_out(running, last))
        if error is not None:
            self.errors += 1
            self._log("the policy failed; SGLang's own order stands in", error)
            if (error := catch_on_all_ranks(self.scheduler, self._fall_back_to_fcfs)) is not None:
                self._log("bringing paused requests back failed", error)
            waiting = self.scheduler.waiting_queue
            self.admission.plan = sorted(waiting, key=lambda r: state_of(r).priority)
        self.pipeline.decide(req.rid for req in self.admission.plan)
        if self.forecasts is not None:
            self.forecasts.step(now)
        self.policy_s += clock.now() - begin
        self._report(now)
        return self._running

    def _meet(self) -> float:
        """The clock of this pass: TP rank 0's, or the first pipeline stage's. The ranks say with it
        which copies are complete; stages, which do not, wait for all of them."""
        transfers, now = self.paused_requests.transfers, self.pipeline.now
        if now is not None:
            transfers.finish_all()
            return now
        clock_word = own_word(self.scheduler, clock.now())
        now, *copied = least(self.scheduler, clock_word, *transfers.progress())
        transfers.heard(*copied)
        return now

    def _report(self, now: float) -> None:
        """Bring the metrics up to date, now and then."""
        if self.decision_log.metrics is None:
            return
        if now - self._reported >= REPORT_S:
            self._reported = now
            seconds = self.policy_s
            if self.phase_tracker is not None:
                seconds += self.phase_tracker.spent_s
            passes = self.request_states.pass_info.pass_no
            totals = {"errors": self.errors, "passes": passes, "seconds": seconds}
            self.decision_log.metrics.update(
                totals, self.planner.queue.lengths(), self.paused_requests.host_tokens
            )
            if self.tool_kv is not None and self.tool_metrics is not None:
                kept = self.tool_kv
                self.tool_metrics.update(
                    len(kept.waits), kept.host_bytes, kept.waits.times.keep_s, kept.counts
                )
        if now - self._reported_waits >= REPORT_WAITS_S:
            self._reported_waits = now
            self.decision_log.metrics.waiting(longest_waits(self.planner.queue, now))

    def _log(self, what: str, error: Exception) -> None:
        if self.errors <= ERRORS_LOGGED:
            logger.error("pascal_sglang: %s", what, exc_info=error)

    def _tick(self, now: float, running: ScheduleBatch, last: ScheduleBatch | None) -> None:
        """A new pass begins, or the turn of another micro-batch in one; `now` is TP rank 0's clock
        in seconds."""
        before = self.request_states.pass_info
        self._turn = (self._turn + 1) % self.pipeline.micro_batches
        if self._turn:
            self.request_states.pass_info = dataclasses.replace(before, now=now)
            return
        began, self._pass_began = self._pass_began, now
        step = now - began if began and now > began else 0.0
        # Only passes of a busy engine say how long a step takes; an idle one may spin or sleep.
        busy = 0.0 < step < LONGEST_PASS_S
        pass_s = before.pass_s
        if busy and last is not None:
            pass_s = running_mean(pass_s, step)
            self.batch = running_mean(self.batch, len(running.reqs))
        if self.migrations is not None:
            self.migrations.passed(step if busy and last is not None else None)
        self.request_states.pass_info = PassInfo(
            before.pass_no + 1, now, pass_s, self.request_states.pass_tokens
        )
        tokens = 0
        if last is not None and last.forward_mode.is_extend():
            tokens = last.extend_num_tokens or 0
        # Under overlap a device is waited for one pass later; a CPU has no other thread to run on.
        lags = self.scheduler.enable_overlap and self.scheduler.device != "cpu"
        if busy:
            self.paused_requests.costs.prefilled(self._extended_before if lags else tokens, step)
        self._extended_before = tokens

    def _carry_out(self, running: ScheduleBatch, last: ScheduleBatch | None) -> None:
        """Settle pauses, plan, pause and resume; `_running` is the batch to go on with."""
        pass_info = self.request_states.pass_info
        if self._chaos is not None:
            self.paused_requests.copies.deferred = self._chaos.defers()
        # Where nothing else is to do, copies are waited for.
        self.request_states.finish_pauses(wait=running.is_empty())
        running = self._arrive(running)
        if self.migrations is not None:
            self.migrations.step(running)
        if self.tool_kv is not None:
            self.tool_kv.step(pass_info.now, self.capacity.spare_tokens(running, last))
        self.admission.check(thorough=self._chaos is not None)
        self.admission.plan = []
        if self.tenants is not None:
            self.tenants.look(self._at_work(running, last), self.planner.queue, pass_info.now)
        if self._chaos is None and self.planner.is_content(
            self.capacity.spare_tokens(running, last)
        ):
            return
        going_on = [r for r in running.reqs if not r.finished()]
        # A request told to end does so in its next step; pausing it would only keep it.
        states = [state_of(r) for r in going_on if r.to_finish is None]
        joining = self.capacity.joining(last) + len(going_on) - len(states)
        self.pool.changed()  # SGLang's steps since the last pass.
        self.lora_slots.read(running, last)
        plan = self.planner.plan(states, self.capacity.available(running), pass_info, joining)
        self.decision_log.blocked(plan.blocked, plan.shortage, pass_info)
        self._pause(plan, running)
        if self._chaos is not None:
            staying = [m for m in states if m not in plan.pause]
            self._pause_by_chance(self._chaos, staying, running)
        self.paused_requests.begin_spills(state.handle for state in plan.spill)
        for state in plan.spill:
            self._spill(state, wait=running.is_empty())
        with self.paused_requests.copies.together():
            self._start(plan, running, joining)
        self._arrive(running)

    def _arrive(self, running: ScheduleBatch) -> ScheduleBatch:
        """The batch to go on with, with those who come back and whose KV is there."""
        self._running = self.paused_requests.arrive(
            running, self.request_states.lost, wait=running.is_empty()
        )
        return self._running

    def _start(self, plan: Plan, running: ScheduleBatch, joining: int) -> None:
        """Have those who wait be admitted, and begin to bring back those who are paused."""
        for state in plan.start:
            if self._chaos is not None and self._chaos.strikes():
                continue
            if state.status is RequestStatus.WAITING:
                if self.tool_kv is not None:
                    self.tool_kv.bring_back(state.handle)
                self.admission.plan.append(state.handle)
                continue
            if not self.lora_slots.take(state.handle):
                continue
            if not self._resume(state.handle, running, joining):
                break

    def _at_work(
        self, running: ScheduleBatch, last: ScheduleBatch | None
    ) -> Iterator[RequestState]:
        """Requests that run, and those that are being prefilled."""
        present = dict.fromkeys(running.reqs)
        if last is not None and last.forward_mode.is_extend():
            present |= dict.fromkeys(last.reqs)
        if self.scheduler.chunked_req is not None:
            present[self.scheduler.chunked_req] = None
        yield from (state_of(r) for r in present if not r.finished())

    def _pause(self, plan: Plan, running: ScheduleBatch) -> None:
        if not plan.pause:
            return
        park = {m.handle for m in plan.park}
        self._take_out(
            plan.pause,
            running,
            "displaced" if plan.start else "growth",
            lambda req: KVTier.RESIDENT if req in park else None,
        )

    def _pause_by_chance(
        self, chaos: Chaos, staying: list[RequestState], running: ScheduleBatch
    ) -> None:
        struck = [m for m in staying if m.pausable and chaos.strikes()]
        if struck:
            self._take_out(
                struck,
                running,
                "chaos",
                lambda req: chaos.tier(recomputes=state_of(req).recomputes),
            )

    def _take_out(
        self,
        states: Sequence[RequestState],
        running: ScheduleBatch,
        why: str,
        tier: Callable[[Req], KVTier | None],
    ) -> None:
        """Pause `states`. `tier` says where the KV goes of those that keep it."""
        for state in states:
            self.request_states.paused(state.handle, why)
        self.paused_requests.leave(
            [m.handle for m in states],
            running,
            lambda req: tier(req) if state_of(req).keeps_kv else KVTier.RECOMPUTE,
        )

    def _spill(self, state: RequestState, *, wait: bool = True, at_any_price: bool = False) -> None:
        tier = self.paused_requests.spill(state.handle, wait=wait, at_any_price=at_any_price)
        if tier is not KVTier.RESIDENT:
            self.request_states.spilled(state.handle, tier)

    def _resume(self, req: Req, running: ScheduleBatch, joining: int) -> bool:
        """Begin to bring a paused request back into the running batch; False if it does not fit
        now."""
        began = clock.now()
        growing = len(running.reqs) + self.paused_requests.count(PauseStatus.ARRIVING) + joining
        ahead = self.capacity.taken_ahead * (growing + 1)
        keep = self.capacity.promised_tokens() + ahead
        keep_windows = self.capacity.promised_windows() + ahead
        resumed = self.paused_requests.can_resume(
            req, keep, keep_windows
        ) and self.paused_requests.resume(req)
        if resumed:
            self.decision_log.resumed(state_of(req), began)
            self.request_states.resumed(req)
        elif not self.paused_requests.holds(req):
            self.request_states.spilled(req, KVTier.RECOMPUTE)
        return resumed

    def _fall_back_to_fcfs(self) -> None:
        """SGLang's order, by priority and arrival: everybody waiting may be admitted, and whoever
        is paused comes back before them."""
        self.request_states.finish_pauses()
        self.pool.changed()
        running = self._arrive(self._running)
        self.lora_slots.read(running, self.scheduler.last_batch)
        with self.paused_requests.copies.together():
            for req in sorted(self.paused_requests.paused(), key=_by_arrival):
                if not self.lora_slots.take(req):
                    continue
                if not self._resume(req, running, joining=len(running.reqs)):
                    break
        self._arrive(running)

    def relieve(self, running: ScheduleBatch) -> bool:
        """Before SGLang retracts because this very step does not fit: who is paused with its KV on
        the device gives it up, then the worst who run leave, with their KV kept.

        The last one stays unless memory is on its way back, so that SGLang can end a request that
        fits nowhere. True if those who stay, because they cannot be paused, have to wait for memory
        that is on its way back.
        """
        if self._fits(running):
            return False
        states = [state_of(r) for r in running.reqs if r.to_finish is None]
        for state in giving_way(self.planner, states, self.request_states.pass_info):
            if state.status is RequestStatus.RESIDENT:
                self._spill(state)
            elif len(running.reqs) > 1 or self.paused_requests.count(
                PauseStatus.LEAVING, PauseStatus.ARRIVING
            ):
                self._take_out([state], running, "memory", lambda _: None)
            else:
                break
            if running.is_empty() or self._fits(running):
                return False
        if self.paused_requests.releasing_tokens > 0:
            self.request_states.finish_pauses(wait=True)
            if self._fits(running):
                return False
            if self.paused_requests.releasing_tokens > 0:
                return True
        # SGLang would drop the KV of a running request next.
        for state in self.planner.queue.resident_worst_first(self.request_states.pass_info):
            self._spill(state, at_any_price=True)
            if self._fits(running):
                break
        return False

    def _fits(self, running: ScheduleBatch) -> bool:
        most = len(running.reqs) * self.pool.in_pages(self.capacity.taken_ahead)
        fits: bool = self.pool.allocator.available_size() >= most or running.check_decode_mem()
        return fits

    def retraction_order(self, reqs: list[Req]) -> list[int]:
        """Indices of `reqs`, whom to keep longest first: SGLang retracts from the end."""
        index = {id(state_of(req)): i for i, req in enumerate(reqs)}
        best = self.planner.queue.ranked(map(state_of, reqs), self.request_states.pass_info)
        self.pipeline.decide(state.handle.rid for state in best)
        return [index[id(state)] for state in best]

    def observe(self, live: Sequence[Req], over: Sequence[Req], now: float) -> None:
        """The requests `live` took part in a pass, whose tokens leave `now`, and `over` of them
        ended in it."""
        reasoning_ended = self.request_states.observe(live)
        if self.forecasts is not None:
            self.forecasts.observe(reasoning_ended, over)
        if self.tool_kv is not None and over:
            self.tool_kv.ended(over)
        if self.migrations is not None:
            self.migrations.observe(live, over, now)
            for req in reasoning_ended:
                self.migrations.reasoning_ended(req)


def held_tokens(state: RequestState) -> int:
    """KV entries that a running request has."""
    held: int = state.handle.kv.kv_committed_len
    return held


def _by_arrival(req: Req) -> tuple[int, int]:
    state = state_of(req)
    return state.priority, state.seq
