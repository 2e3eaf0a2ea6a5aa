"""SGLang's operations on requests that run or wait, extended to the requests that we hold.

Paused requests, and those that a migration holds, are in no batch and no queue of SGLang. An
operation that walks batches and queues, or drops KV, would pass them by. `docs/operations.md` lists
these operations.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.scheduler import _make_abort_req
from sglang.srt.runtime_context import get_serving

from pascal_sglang import clock
from pascal_sglang.engine.load_reporter import LoadReporter
from pascal_sglang.engine.migration.manager import Migrations
from pascal_sglang.engine.observability.phases import PhaseTracker
from pascal_sglang.engine.stock_load_figures import ReportingScheduler, held_back
from pascal_sglang.engine.termination import Termination


class OperationsScheduler(ReportingScheduler):
    """SGLang's scheduler, whose operations reach the requests that we hold."""

    # SGLang's.
    waiting_queue: list[Req]
    max_queued_requests: int | None
    enable_priority_scheduling: bool

    load_reporter: LoadReporter | None = None
    termination: Termination | None = None
    migrations: Migrations | None = None
    phase_tracker: PhaseTracker

    def collect_inflight_reqs(self) -> set[Req]:
        """Every request that has begun and is not in the waiting queue."""
        inflight: set[Req] = super().collect_inflight_reqs()
        return (
            inflight
            if self.plan_executor is None
            else inflight | self.plan_executor.paused_requests.held()
        )

    def is_fully_idle(
        self, for_health_check: bool = False, ignore_waiting: bool | None = None
    ) -> bool:
        """Held requests count as running, and so do copies that may still read or write KV here,
        until a pass knows that they are complete. Where SGLang gives `ignore_waiting` it is about
        to drop all KV, and may end the server if it cannot: copies are waited for then, by each
        rank alone, as one whose update of weights has failed is not asked. A migration counts there
        only if it holds KV here, if generation is paused. A health check is no matter of copies:
        they end without an output to answer it."""
        idle: bool = super().is_fully_idle(for_health_check, bool(ignore_waiting))
        if self.plan_executor is not None:
            paused_requests = self.plan_executor.paused_requests
            transfers = paused_requests.transfers
            if ignore_waiting is not None:
                transfers.wait_here()
            ended = for_health_check or ignore_waiting is not None or transfers.is_empty
            idle = idle and paused_requests.is_empty() and ended
        if self.migrations is not None:
            idle = idle and (
                self.migrations.holds_no_kv() if ignore_waiting else self.migrations.is_empty()
            )
        return idle

    def pause_generation(self, recv_req: PauseGenerationReqInput) -> None:
        """`retract` sends every held request back to the waiting queue, as SGLang does with those
        that run, and their KV is dropped. `in_place` leaves all as it is: there are no passes
        meanwhile, and so no pause, no resume and no step of a migration. Copies under way are
        waited for in any case: KV memory may be unmapped next, and no pass would say that they are
        complete."""
        super().pause_generation(recv_req)
        if self.plan_executor is None:
            return
        retracts = recv_req.mode == "retract"
        if retracts and self.migrations is not None:
            self.migrations.give_up("generation paused")
        self.plan_executor.paused_requests.transfers.finish_all()
        if retracts:
            self.plan_executor.request_states.retract_held()

    def record_weight_version_change(self, new_version: str | None) -> None:
        """Which weights made which token is kept where a request is: it does not travel."""
        changes = new_version is not None and new_version != get_serving().weight_version
        if self.migrations is not None and changes:
            self.migrations.give_up("weights changed")
        if self.plan_executor is not None and self.plan_executor.tool_kv is not None:
            # Whatever SGLang is told to do with its prefix cache, and also without a version.
            self.plan_executor.tool_kv.drop()
        super().record_weight_version_change(new_version)

    def flush_cache(self, *args: Any, **kwargs: Any) -> bool:
        """With the prefix cache, what was saved from it for later turns is dropped."""
        flushed: bool = super().flush_cache(*args, **kwargs)
        if flushed and self.plan_executor is not None and self.plan_executor.tool_kv is not None:
            self.plan_executor.tool_kv.drop()
        return flushed

    def _record_scheduler_state_for_paused_engine(self) -> None:
        """An instance whose generation is paused still reports to the controller, and may have to
        end."""
        super()._record_scheduler_state_for_paused_engine()
        if self.load_reporter is not None:
            self.load_reporter.tell(None, clock.now())  # There are no passes meanwhile.
        if self.termination is not None:
            self.termination.step()

    def send_abort_output(self, abort_req: AbortReq, req: Req) -> None:
        """End a request outside of a batch.

        SGLang's message for this carries no tokens: right for a request that has not begun. One
        that has ends like a running one, with a last output, so that no token is lost.
        """
        if self.migrations is not None:
            self.migrations.gone(req)
        if self.plan_executor is not None:
            self.plan_executor.request_states.ended(req)
            if req.output_ids and req.beam_group is None:
                self._send_last_output(abort_req.finished_reason, req)
                return
        self._send_abort_alone(abort_req, req)

    def _send_last_output(self, reason: dict[str, Any] | None, req: Req) -> None:
        if not req.finished():
            if req.to_finish is None:
                given = {} if reason is None else reason
                known = ("message", "status_code", "err_type")
                req.to_finish = FINISH_ABORT(*(given.get(name) for name in known))
            req.update_finish_state()
        req.time_stats.set_completion_time()
        self.output_streamer.stream_output([req], req.return_logprob)

    def _send_abort_alone(self, abort_req: AbortReq, req: Req) -> None:
        self.phase_tracker.ended(req, clock.now(), aborted=True)
        if self.load_reporter is not None:
            self.load_reporter.gone(req)
        super().send_abort_output(abort_req, req)

    def _abort_on_queued_limit(self, recv_req: Req) -> bool:
        """Whether `--max-queued-requests` refuses the request. Paused requests count as queued, and
        none that has begun is refused or makes room: its tokens are with its client."""
        if self.plan_executor is None or self.max_queued_requests is None:
            return bool(super()._abort_on_queued_limit(recv_req))
        if recv_req.output_ids:
            return False
        waiting, limit = self.waiting_queue, self.max_queued_requests
        by_priority = self.enable_priority_scheduling
        fresh = [req for req in waiting if not req.output_ids]
        begun = len(waiting) - len(fresh) + len(held_back(self.plan_executor.paused_requests))
        self.waiting_queue, self.max_queued_requests = fresh, limit - begun
        # By priority, SGLang looks for the worst of the queue, which must not be empty.
        self.enable_priority_scheduling = by_priority and bool(fresh)
        try:
            return bool(super()._abort_on_queued_limit(recv_req))
        finally:
            left = set(self.waiting_queue)
            self.waiting_queue = [req for req in waiting if req.output_ids or req in left]
            self.max_queued_requests, self.enable_priority_scheduling = limit, by_priority

    def end_early(self, req: Req, problem: str | None) -> None:
        """End a request that holds no KV any more: aborted by its client, or for a problem, after
        which not all of its tokens are known here."""
        self._release_aborted_request(req)
        if problem is None:
            self.send_abort_output(_make_abort_req(req), req)
            return
        if self.plan_executor is not None:
            self.plan_executor.request_states.ended(req)
        status = HTTPStatus.SERVICE_UNAVAILABLE
        reason: Any = {"type": "abort", "status_code": status, "message": problem}
        self._send_abort_alone(_make_abort_req(req, finished_reason=reason), req)
