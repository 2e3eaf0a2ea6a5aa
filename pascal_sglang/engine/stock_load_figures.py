"""SGLang's load figures, queue metrics and time-outs: a paused request is a queued one there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.load_snapshot import LoadSnapshot
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.load_inquirer import SchedulerLoadInquirer
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.observability.queue_times import with_paused

if TYPE_CHECKING:
    from pascal_sglang.engine.plan_executor import PlanExecutor


def held_back(paused_requests: PausedRequests) -> list[Req]:
    """Every request that has begun and does not run: paused, on its way out, or on its way back."""
    held = paused_requests.in_status(
        PauseStatus.LEAVING, PauseStatus.RESIDENT, PauseStatus.HOST, PauseStatus.ARRIVING
    )
    return [req for req in held if not req.finished()]


class PascalMetricsReporter(SchedulerMetricsReporter):
    """Reports as SGLang does; its scheduler's waiting queue holds the paused requests meanwhile."""

    def report_prefill_stats(self, *args: Any, **kwargs: Any) -> None:
        with self._paused_queued():
            super().report_prefill_stats(*args, **kwargs)

    def report_decode_stats(self, *args: Any, **kwargs: Any) -> None:
        # Between two reports it only counts tokens, in every step.
        if self.forward_ct_decode % self.decode_log_interval:
            super().report_decode_stats(*args, **kwargs)
            return
        with self._paused_queued():
            super().report_decode_stats(*args, **kwargs)

    def _emit_forward_pass_metrics(self, *args: Any, **kwargs: Any) -> None:
        if not self.scheduler.enable_fpm:
            return
        with self._paused_queued():
            super()._emit_forward_pass_metrics(*args, **kwargs)

    def _maybe_log_idle_metrics(self) -> None:
        with self._paused_queued():
            super()._maybe_log_idle_metrics()

    @contextmanager
    def _paused_queued(self) -> Iterator[None]:
        executor = getattr(self.scheduler, "plan_executor", None)
        held = [] if executor is None else held_back(executor.paused_requests)
        if not held:
            yield
            return
        waiting = self.scheduler.waiting_queue
        self.scheduler.waiting_queue = waiting + held
        try:
            yield
        finally:
            self.scheduler.waiting_queue = waiting


@dataclass(kw_only=True, slots=True, frozen=True)
class PascalLoadInquirer(SchedulerLoadInquirer):
    """Counts the requests of `get_held_back` as waiting, and KV in host memory, `get_host_tokens`,
    as wanted. Neither waits for a prefill."""

    get_held_back: Callable[[], Sequence[Req]]
    get_host_tokens: Callable[[], int]

    def get_loads(self) -> LoadSnapshot:
        loads = SchedulerLoadInquirer.get_loads(self)
        held, tokens = len(self.get_held_back()), self.get_host_tokens()
        queues = loads.queues
        if queues is not None:
            queues = msgspec.structs.replace(queues, waiting=queues.waiting + held)
        return msgspec.structs.replace(
            loads,
            num_waiting_reqs=loads.num_waiting_reqs + held,
            num_total_tokens=loads.num_total_tokens + tokens,
            num_active_tokens=loads.num_active_tokens + tokens,
            queues=queues,
        )


class ReportingScheduler(Scheduler):
    """SGLang's scheduler that reports paused requests as queued."""

    plan_executor: PlanExecutor | None = None
    load_inquirer: Any

    def init_metrics_reporter(self) -> None:
        self.metrics_reporter = PascalMetricsReporter(
            scheduler=self,
            metrics_collector_context=self.metrics_collector_context,
            metrics_collector=self.metrics_collector,
        )

    def init_load_inquirer(self) -> None:
        super().init_load_inquirer()
        if self.plan_executor is None:
            return
        paused_requests = self.plan_executor.paused_requests
        stock: Any = self.load_inquirer
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
        self.load_inquirer = PascalLoadInquirer(
            **fields,
            get_held_back=lambda: held_back(paused_requests),
            get_host_tokens=lambda: paused_requests.host_tokens,
        )

    def _poll_timeout_aborts(self) -> list[AbortReq]:
        aborts: list[AbortReq] = super()._poll_timeout_aborts()
        if self.plan_executor is None:
            return aborts
        return with_paused(aborts, self.waiting_queue, self.plan_executor.paused_requests.paused())
