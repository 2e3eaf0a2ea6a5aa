"""A request that leaves without KV: one that waits, or one whose KV no other instance has memory
for. It waits to be prefilled on its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.outgoing_kv import KEPT, OutgoingKV
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.kv_tier import KVTier
from pascal_sglang.policy.request import RequestStatus


@dataclass(kw_only=True, slots=True, eq=False)
class OutgoingWaiting(OutgoingKV):
    """The place of its KV is taken by nothing: its pieces are empty."""

    scheduler: SchedulerProtocol

    def status(self, running: set[Req]) -> RequestStatus | None:
        """Where the request is; None while it leaves or joins the batch, or is prefilled."""
        paused = self.paused_requests.status_of(self.req)
        if paused is PauseStatus.DROPPED or self.req in self.scheduler.waiting_queue:
            return RequestStatus.WAITING
        if (kept := KEPT.get(paused)) is not None:
            return kept
        return RequestStatus.RUNNING if self.req in running else None

    def is_lost(self, running: set[Req]) -> bool:
        """Whether it is none of this migration's any more: its prefill has begun."""
        paused = self.paused_requests.status_of(self.req)
        return paused is None and self.status(running) is None

    def tokens(self, status: RequestStatus, in_flight: bool) -> int:
        return 0

    def before(self, status: RequestStatus, tokens: int) -> int:
        return 0

    def write(
        self,
        begin: int,
        end: int,
        before: int,
        status: RequestStatus,
        *,
        stopped: bool = False,
        beside: bool = False,
    ) -> None:
        """There is nothing to write, no recurrent state either: its prefill makes a new one."""

    def take_out(self, running: ScheduleBatch, unline: Callable[[Req], None]) -> None:
        """Out of wherever it is; its KV, if it has any, is dropped as for a recompute."""
        paused_requests, req = self.paused_requests, self.req
        status = self.status(set(running.reqs))
        if status is RequestStatus.RUNNING:
            paused_requests.leave([req], running, lambda _: KVTier.RECOMPUTE)
            paused_requests.begin_migration(req)
            return
        unline(req)
        if status is RequestStatus.WAITING:
            self.scheduler.waiting_queue.remove(req)
            paused_requests.set_out(req)
            return
        paused_requests.begin_migration(req)
        paused_requests.let_go(req)
        req.reset_for_retract()
