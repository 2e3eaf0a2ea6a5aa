"""Tells the controller how this instance is, when something has changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.cluster.control_channel import CONTROL_ENV, CONTROLLER, ControlSender
from pascal_sglang.cluster.messages import (
    MAX_ITEMS,
    ControlAnswered,
    LoadReport,
    LocationQuery,
    LocationReply,
    RequestFinished,
)
from pascal_sglang.cluster.prefix_index import block_names
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.instances import own_instance, speaks
from pascal_sglang.policy.placement import NO_LIMIT
from pascal_sglang.policy.prefix_namespace import namespace_of
from pascal_sglang.policy.ranking import is_demoted
from pascal_sglang.policy.timeline import Phase

EVERY_S = 0.02
ALIVE_S = 1.0


@dataclass(kw_only=True, slots=True, eq=False)
class LoadReporter:
    """Sends a `LoadReport` when something has changed, at most every `EVERY_S` seconds while busy,
    and at least every `ALIVE_S` seconds."""

    scheduler: SchedulerProtocol
    executor: PlanExecutor
    control_sender: ControlSender
    # Requests taken in since the start.
    received: int = 0
    _dp_rank: int = field(default_factory=own_instance)
    _last: LoadReport | None = None
    _sent_at: float = 0.0

    def tell(self, batch: ScheduleBatch | None, now: float) -> None:
        """Say how it is `now`; `batch` is what runs next."""
        if batch is not None and now - self._sent_at < EVERY_S:
            return
        status = self.status(batch)
        if status == self._last and now - self._sent_at < ALIVE_S:
            return
        if self.control_sender.send(CONTROLLER, status):
            self._last, self._sent_at = status, now

    def gone(self, req: Req) -> None:
        """The request has ended here: its KV may serve its conversation's next turn."""
        ids = req.origin_input_ids + req.output_ids_through_stop
        blocks = list(islice(block_names(ids, namespace_of(req)), MAX_ITEMS))
        self.control_sender.send(CONTROLLER, RequestFinished(self._dp_rank, req.rid, blocks))

    def located(self, query: LocationQuery, alive: set[str]) -> None:
        """Answer which of some requests live here. alive: the ids of all that do."""
        here = [rid for rid in query.rids if rid in alive]
        reply = LocationReply(self._dp_rank, query.number, self.received, here)
        self.control_sender.send(CONTROLLER, reply)

    def answered(self, request: Any) -> None:
        """A control request has been answered to the tokenizer manager."""
        self.control_sender.send(CONTROLLER, ControlAnswered(self._dp_rank, type(request).__name__))

    def status(self, batch: ScheduleBatch | None) -> LoadReport:
        return LoadReport(
            dp_rank=self._dp_rank,
            received=self.received,
            **load_figures(self.scheduler, self.executor, batch),
        )


def load_figures(
    scheduler: SchedulerProtocol, executor: PlanExecutor, batch: ScheduleBatch | None
) -> dict[str, Any]:
    """This instance in the terms of `policy.placement.LoadFigures`. batch: the one that runs: who
    is prefilled in it is neither waiting nor running."""
    planner, config = executor.planner, executor.request_states.config
    arriving = executor.paused_requests.in_status(PauseStatus.ARRIVING)
    # Of each micro-batch, with pipeline stages.
    batches = getattr(scheduler, "running_mbs", None) or [scheduler.running_batch]
    present = dict.fromkeys([*chain.from_iterable(b.reqs for b in batches), *arriving])
    if batch is not None:
        present |= dict.fromkeys(batch.reqs)
    if scheduler.chunked_req is not None:
        present[scheduler.chunked_req] = None
    running = [m for r in present if not (r.finished() or (m := state_of(r)).internal)]
    paused = [state_of(r) for r in executor.paused_requests.paused()]
    answering = [m for m in (*running, *paused) if m.phase is Phase.ANSWERING]
    priority_class = planner.policy.reasoning_class
    queued = sum(n for (lane_of, _), n in planner.queue.counts.items() if lane_of == priority_class)
    reasoning = sum(
        m.phase is Phase.REASONING and not is_demoted(m, planner.tuning) for m in running
    )
    rule = config.record.placement
    if rule is not None and rule.running_qoe:
        readers = [m.pacer for m in answering]
        # An answer at a pace that cannot be delivered says nothing about the instance.
        on_pace = all(p.qoe >= config.qoe_slo for p in readers if p.pace <= p.tpot)
    else:
        # Nobody is starving now; a reader who once waited does not mark it for good.
        now = executor.request_states.pass_info.now
        on_pace = all(m.pacer.slack(now) >= 0 for m in answering if m.pacer.delivered)
    capacity = executor.capacity
    used = round(scheduler.max_total_num_tokens * capacity.used_share())
    fits = capacity.requests_beside() - len(scheduler.waiting_queue)
    return {
        "on_pace": on_pace,
        "footprint": used + executor.paused_requests.host_tokens,
        "reasoning": reasoning + queued,
        "fresh": sum(m.phase_tokens < planner.tuning.quantum for m in answering),
        "free": executor.pool.free_tokens,
        "fits": min(max(0, fits), NO_LIMIT),
        "waiting": sum(state_of(r).kv_tokens for r in scheduler.waiting_queue),
        "capacity": scheduler.max_total_num_tokens,
        "load": len(running) + len(paused) + len(scheduler.waiting_queue),
        "pass_us": round(1e6 * executor.request_states.pass_info.token_s),
        "batch": round(executor.batch),
        "prefill_ns": round(1e9 * (executor.paused_requests.costs.prefill_token_s or 0.0)),
    }


def build_load_reporter(
    scheduler: SchedulerProtocol, executor: PlanExecutor | None
) -> LoadReporter | None:
    """The load reporter of an instance's leading rank behind our controller; None otherwise."""
    place = os.environ.get(CONTROL_ENV)
    if place is None or executor is None or not speaks():
        return None
    return LoadReporter(
        scheduler=scheduler,
        executor=executor,
        control_sender=ControlSender(place, own_instance()),
    )
