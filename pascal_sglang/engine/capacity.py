"""What there is to give in this pass, in the policy's terms."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.plan import Capacity, growth
from pascal_sglang.policy.request import RequestState, RequestStatus


@dataclass(kw_only=True, slots=True, eq=False)
class CapacityView:
    """Reads memory and slots off a live scheduler."""

    scheduler: SchedulerProtocol
    paused_requests: PausedRequests
    pool: Pool

    def available(self, running: ScheduleBatch) -> Capacity:
        scheduler = self.scheduler
        return Capacity(
            free_tokens=self.pool.free_tokens - self.promised_tokens(),
            releasing_tokens=self.paused_requests.releasing_tokens,
            slots=min(
                scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running),
                scheduler.max_running_requests - len(running.reqs),
            )
            + self.paused_requests.count(PauseStatus.LEAVING),
        )

    def spare_tokens(self, running: ScheduleBatch, last: ScheduleBatch | None) -> int:
        """At least how much KV is left after the next steps of all who run or come out of a
        prefill; what could be evicted and what is on its way back is not counted."""
        free: int = self.pool.allocator.available_size()
        return free - self.promised_tokens() - growth(len(running.reqs) + self.joining(last))

    def promised_tokens(self) -> int:
        """KV the rest of a chunked prefill will take: SGLang goes on with it unasked."""
        chunked = self.scheduler.chunked_req
        if chunked is None:
            return 0
        whole = len(chunked.origin_input_ids) + len(chunked.output_ids)
        rest: int = max(0, whole - chunked.kv.kv_committed_len)
        return rest

    def joining(self, last: ScheduleBatch | None) -> int:
        """How many come out of a prefill in this pass, the one still being prefilled in chunks
        included."""
        chunked: Req | None = self.scheduler.chunked_req
        fresh = 0
        if last is not None and last.forward_mode.is_extend():
            fresh = sum(not r.finished() and r is not chunked for r in last.reqs)
        return fresh + (chunked is not None)

    def required(self, state: RequestState) -> int:
        """KV a start takes: a prefix the device holds for others is paid already."""
        req: Req = state.handle
        if state.status is not RequestStatus.WAITING:
            return self.paused_requests.needs(req)
        prefix = self.pool.cached_prefix(req, state.kv_tokens - 1)
        return self.pool.in_pages(state.kv_tokens - prefix.tokens) + prefix.evictable

    def reclaimable(self, state: RequestState) -> int:
        """KV that is free or evictable once the request has left the device."""
        return self.pool.given_back(state.handle)
