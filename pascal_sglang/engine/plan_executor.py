"""Carries out the policy's plan on a live scheduler, one pass at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.admission import Admission
from pascal_sglang.engine.capacity import View
from pascal_sglang.engine.chaos import Chaos
from pascal_sglang.engine.kv.host_copies import Copies
from pascal_sglang.engine.kv.paused import Ladder
from pascal_sglang.engine.observability.decision_log import Journal
from pascal_sglang.engine.observability.queue_times import entered_queue, left_queue
from pascal_sglang.engine.request_states import Members, member_of, remaining_of
from pascal_sglang.engine.tp_ranks import agree, catch_on_all_ranks, is_alone
from pascal_sglang.policy.kv_tier import Costs, Rung
from pascal_sglang.policy.plan import Plan, Planner, Worth
from pascal_sglang.policy.ranking import ORDERS, PREFIX_HEAD_START, Moment, Tuning
from pascal_sglang.policy.request import Member, Place

if TYPE_CHECKING:
    from pascal_sglang.engine.migration.manager import Moves

logger = logging.getLogger(__name__)

# Seconds between two updates of the metrics that every pass changes.
REPORT_S = 0.1
ERRORS_LOGGED = 5

PLACES = {Rung.RESIDENT: Place.RESIDENT, Rung.HOST: Place.HOST, Rung.RECOMPUTE: Place.WAITING}


class Governor:
    """Builds the policy's view, executes its plan, keeps the members true.

    Every decision is a function of the request stream, the KV pool and the clock of TP rank 0, so
    all TP ranks decide alike.
    """

    def __init__(
        self,
        scheduler: Any,
        config: PascalConfig,
        copies: Copies,
        costs: Costs,
    ) -> None:
        self.scheduler = scheduler
        self.ladder = Ladder(scheduler, copies, costs)
        self.pool = self.ladder.pool
        self.view = View(scheduler, self.ladder)
        self.members = Members(config)
        order = ORDERS[config.policy]
        tuning = Tuning(
            quantum=config.quantum_tokens,
            demote=config.demote_tokens,
            demote_on=config.demote_on,
        )
        self.planner = Planner(order, tuning, Worth(self.view.needs, self.view.gives))
        self.admission = Admission(scheduler, self.ladder, self.planner)
        self.journal = Journal(order, tuning, log=config.log_decisions)
        self.moment = Moment(0, 0.0, 0.0)
        # Mean number of running requests over the passes of `moment.pass_s`.
        self.batch = 0.0
        self.errors = 0
        self.policy_s = 0.0
        self.moves: Moves | None = None
        self._chaos = Chaos(config.chaos) if config.chaos else None
        self._extended_before = 0
        self._reported = 0.0
        self._alone = is_alone(scheduler)

    def govern(self, running: ScheduleBatch, last: ScheduleBatch | None) -> ScheduleBatch:
        """Begin a pass. An error of ours is logged and counted, and SGLang's order stands in.
        Raises: RanksDiverged if it is not the same on all TP ranks."""
        now = time.perf_counter()
        self._tick(now if self._alone else agree(self.scheduler, now), running, last)
        begin = time.perf_counter()
        self._running = running  # With all who come back: an error must not lose them.
        error = catch_on_all_ranks(self.scheduler, lambda: self._carry_out(running, last))
        if error is not None:
            self.errors += 1
            self._log("the policy failed; SGLang's own order stands in", error)
            if (error := catch_on_all_ranks(self.scheduler, self._stand_in)) is not None:
                self._log("bringing paused requests back failed", error)
            self.admission.plan = list(self.scheduler.waiting_queue)
        self.policy_s += time.perf_counter() - begin
        if self.journal.metrics is not None and begin - self._reported >= REPORT_S:
            self._reported = begin
            passes, seconds = self.moment.pass_no, self.policy_s
            totals = {"errors": self.errors, "passes": passes, "seconds": seconds}
            self.journal.metrics.update(totals, self.planner.line.lengths())
        return self._running

    def _log(self, what: str, error: Exception) -> None:
        if self.errors <= ERRORS_LOGGED:
            logger.error("pascal_sglang: %s", what, exc_info=error)

    def _tick(self, now: float, running: ScheduleBatch, last: ScheduleBatch | None) -> None:
        """A new pass begins; `now` is TP rank 0's clock in seconds."""
        before = self.moment
        step = now - before.now if before.now and now > before.now else 0.0
        # Only passes of a busy engine say how long a step takes; an idle one may spin or sleep.
        busy = 0.0 < step < 1.0
        pass_s = before.pass_s
        if busy and last is not None:
            pass_s = 0.9 * pass_s + 0.1 * step
            self.batch = 0.9 * self.batch + 0.1 * len(running.reqs)
        self.moment = Moment(before.pass_no + 1, now, pass_s)
        tokens = 0
        if last is not None and last.forward_mode.is_extend():
            tokens = last.extend_num_tokens or 0
        # Under overlap a device is waited for one pass later; a CPU has no other thread to run on.
        lags = self.scheduler.enable_overlap and self.scheduler.device != "cpu"
        if busy:
            self.ladder.costs.prefilled(self._extended_before if lags else tokens, step)
        self._extended_before = tokens

    def _carry_out(self, running: ScheduleBatch, last: ScheduleBatch | None) -> None:
        """Settle pauses, plan, pause and resume; `_running` is the batch to go on with."""
        moment = self.moment
        if self._chaos is not None:
            self.ladder.copies.deferred = self._chaos.defers()
        self.settle()
        running = self._running = self.ladder.arrive(running)
        if self.moves is not None:
            self.moves.step(running)
        self.admission.check(thorough=self._chaos is not None)
        self.admission.plan = []
        if self._chaos is None and self.planner.is_content(self.view.spare_tokens(running, last)):
            return
        going_on = [r for r in running.reqs if not r.finished()]
        # A request told to end does so in its next step; pausing it would only keep it.
        members = [member_of(r) for r in going_on if r.to_finish is None]
        joining = self.view.joining(last) + len(going_on) - len(members)
        plan = self.planner.plan(members, self.view.room(running), moment, joining)
        self.journal.blocked(plan.blocked, plan.lacks, moment)
        self._pause(plan, running)
        if self._chaos is not None:
            staying = [m for m in members if m not in plan.pause]
            self._pause_by_chance(self._chaos, staying, running)
        for member in plan.spill:
            self._spill(member)
        for member in plan.start:
            if self._chaos is not None and self._chaos.strikes():
                continue
            if member.place is Place.WAITING:
                self.admission.plan.append(member.handle)
                continue
            resumed = self._resume(member.handle, running, joining)
            if resumed is None:
                break
            running = resumed

    def settle(self) -> None:
        """Handle the KV of everybody who has left the batch and whose last token has arrived."""
        for req, rung in self.ladder.settle():
            if req in self.ladder.moving and rung is not Rung.RECOMPUTE:
                continue
            self.ladder.moving.discard(req)
            self.stopped(req, PLACES[rung])
            self.journal.left_device(member_of(req), rung, self.moment)
            if rung is Rung.RECOMPUTE:
                self.scheduler.waiting_queue.append(req)

    def _pause(self, plan: Plan, running: ScheduleBatch) -> None:
        if not plan.pause:
            return
        park = {m.handle for m in plan.park}
        self._take_out(
            plan.pause,
            running,
            "displaced" if plan.start else "growth",
            lambda req: Rung.RESIDENT if req in park else None,
        )

    def _pause_by_chance(self, chaos: Chaos, staying: list[Member], running: ScheduleBatch) -> None:
        struck = [m for m in staying if m.pausable and chaos.strikes()]
        if struck:
            self._take_out(struck, running, "chaos", lambda _: chaos.rung())

    def _take_out(
        self,
        members: Sequence[Member],
        running: ScheduleBatch,
        why: str,
        rung: Callable[[Req], Rung | None],
    ) -> None:
        for member in members:
            member.kv_tokens = member.handle.kv.kv_committed_len
            self.journal.paused(member, self.moment, why)
        self.ladder.leave([m.handle for m in members], running, rung)

    def _spill(self, member: Member) -> None:
        self._fell(member.handle, self.ladder.spill(member.handle))

    def _fell(self, req: Req, rung: Rung) -> None:
        """A paused request's KV went down to that rung."""
        self._stands(req, PLACES[rung])
        self.planner.spilled(member_of(req), PLACES[rung])
        self.journal.left_device(member_of(req), rung, self.moment)
        if rung is Rung.RECOMPUTE:
            self.scheduler.waiting_queue.append(req)

    def _resume(self, req: Req, running: ScheduleBatch, joining: int) -> ScheduleBatch | None:
        """Bring a paused request back into the running batch; None if it does not fit now."""
        growing = len(running.reqs) + len(self.ladder.arriving) + joining
        keep = self.view.promised_tokens() + growing + 1
        resumed = self.ladder.resume(req, running) if self.ladder.can_resume(req, keep) else None
        if resumed is not None:
            self._running = resumed
            left_queue(req)
            self.journal.started(member_of(req), self.moment)
            self.planner.started(member_of(req), self.moment)
        elif not self.ladder.holds(req):
            self._fell(req, Rung.RECOMPUTE)
        return resumed

    def _stand_in(self) -> None:
        """SGLang's order: everybody waiting may be admitted, and whoever is paused comes back in
        the order of arrival, before them."""
        self.settle()
        running = self._running = self.ladder.arrive(self._running)
        for req in sorted(self.ladder.paused(), key=lambda r: member_of(r).seq):
            resumed = self._resume(req, running, joining=len(running.reqs))
            if resumed is None:
                break
            running = resumed

    def relieve(self, running: ScheduleBatch) -> bool:
        """Before SGLang retracts because this very step does not fit: who is paused with its KV on
        the device gives it up, then the worst who run leave, with their KV kept.

        The last one stays unless memory is on its way back, so that SGLang can end a request that
        fits nowhere. True if those who stay, because they cannot be paused, have to wait for memory
        that is on its way back.
        """
        if self._fits(running):
            return False
        for member in self.planner.parked_worst_first(self.moment):
            self._spill(member)
            if self._fits(running):
                return False
        members = [member_of(r) for r in running.reqs if r.to_finish is None]
        for member in self.planner.victims.worst_first(members, self.moment):
            if len(running.reqs) == 1 and not (self.ladder.leaving or self.ladder.arriving):
                break
            self._take_out([member], running, "memory", lambda _: None)
            if running.is_empty() or self._fits(running):
                return False
        return self.ladder.releasing_tokens > 0

    def _fits(self, running: ScheduleBatch) -> bool:
        pages = len(running.reqs) * self.scheduler.page_size
        fits: bool = self.pool.allocator.available_size() >= pages or running.check_decode_mem()
        return fits

    def retraction_order(self, reqs: list[Req]) -> list[int]:
        """Indices of `reqs`, whom to keep longest first: SGLang retracts from the end."""
        index = {id(member_of(req)): i for i, req in enumerate(reqs)}
        best = self.planner.best_first(map(member_of, reqs), self.moment)
        return [index[id(member)] for member in best]

    def queued(self, req: Req) -> None:
        """The request entered the waiting queue, for the first time or after a retraction."""
        whole = len(req.origin_input_ids) + len(req.output_ids)
        held = self.pool.held(req, whole - 1)
        member_of(req).head_start = PREFIX_HEAD_START * held.tokens // whole
        self.stopped(req, Place.WAITING)

    def stopped(self, req: Req, place: Place) -> None:
        """The request waits, or is paused, from now on."""
        entered_queue(req)
        self._stands(req, place)
        self.planner.stopped(member_of(req), place, self.moment)

    def _stands(self, req: Req, place: Place) -> None:
        """Say what starting the request again takes. Nobody asks that of one who runs."""
        member = member_of(req)
        member.remaining = remaining_of(req, member)
        if place is Place.RESIDENT:
            member.kv_tokens = req.kv.kv_committed_len
        elif place is Place.HOST:
            member.kv_tokens = self.ladder.host[req].tokens
        else:
            member.kv_tokens = len(req.origin_input_ids) + len(req.output_ids)

    def gone(self, req: Req) -> None:
        """The request ended outside the running batch."""
        self.planner.left(member_of(req))

    def prefilled(self, req: Req) -> None:
        """The engine took the request into a prefill batch."""
        self.journal.started(member_of(req), self.moment)
        self.planner.started(member_of(req), self.moment)

    def observe(self, req: Req) -> None:
        crossed = self.members.observe(req, self.moment)
        if self.moves is not None:
            self.moves.observe(req)
            if crossed:
                self.moves.crossed(req)
