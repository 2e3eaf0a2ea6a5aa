"""What there is to give in this pass, in the policy's terms."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.pool import CachedPrefix, Pool
from pascal_sglang.engine.lora_slots import LoraSlots
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.plan import UNLIMITED, Capacity, room_to_grow
from pascal_sglang.policy.request import RequestState, RequestStatus


@dataclass(kw_only=True, slots=True, eq=False)
class CapacityView:
    """Reads memory and slots off a live scheduler."""

    scheduler: SchedulerProtocol
    paused_requests: PausedRequests
    pool: Pool
    lora_slots: LoraSlots
    # False: a plan says in which order requests start, and SGLang which of them fit.
    counts_kv: bool = True
    # The most tokens that a step gives a request, and the KV entries that a request has to have
    # beyond its tokens when a step begins.
    step_tokens: int = 1
    taken_ahead: int = 1
    # The last match of a waiting request, and what it was for.
    _matched: tuple[tuple[RequestState, int, int], CachedPrefix] | None = None

    def available(self, running: ScheduleBatch) -> Capacity:
        scheduler = self.scheduler
        free = self.pool.free_tokens - self.promised_tokens() if self.counts_kv else UNLIMITED
        return Capacity(
            free_tokens=free,
            releasing_tokens=self.paused_requests.releasing_tokens,
            slots=min(
                scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running),
                scheduler.max_running_requests - len(running.reqs),
            )
            + self.paused_requests.count(PauseStatus.LEAVING),
            states=self.free_states() + self.paused_requests.releasing_states,
            windows=self.free_windows() + self.paused_requests.releasing_windows,
        )

    def free_states(self) -> int:
        """Recurrent states that may be given now."""
        states = self.pool.states
        if states is None or not self.counts_kv:
            return UNLIMITED
        return states.free

    def free_windows(self) -> int:
        """Entries of sliding windows that may be given now."""
        windows = self.pool.windows
        if windows is None or not self.counts_kv:
            return UNLIMITED
        return windows.free - self.promised_windows()

    def used_share(self) -> float:
        """How much of the scarcest is in use: KV, recurrent states, or entries of sliding windows.
        What can be evicted is not."""
        whole = self.scheduler.max_total_num_tokens
        shares = [1 - self.pool.free_tokens / max(1, whole)]
        for beside in (self.pool.states, self.pool.windows):
            if beside is not None:
                shares.append(1 - beside.free / max(1, beside.size))
        return min(1.0, max(0.0, *shares))

    def requests_beside(self) -> int:
        """For how many more requests there are recurrent states and sliding windows."""
        states, windows = self.pool.states, self.pool.windows
        return min(
            UNLIMITED if states is None else states.free // states.for_prefill,
            UNLIMITED if windows is None else self.free_windows() // windows.most,
        )

    def promised_windows(self) -> int:
        """Entries of sliding windows the next chunk of a chunked prefill will take."""
        if self.pool.windows is None:
            return 0
        return min(self.promised_tokens(), self.scheduler.chunked_prefill_size or UNLIMITED)

    def spare_tokens(self, running: ScheduleBatch, last: ScheduleBatch | None) -> int:
        """At least how much KV is left after the next steps of all who run or come out of a
        prefill; what could be evicted and what is on its way back is not counted."""
        free: int = self.pool.allocator.available_size()
        growing = len(running.reqs) + self.joining(last)
        return free - self.promised_tokens() - room_to_grow(growing, self.step_tokens)

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
        if not self.counts_kv:
            return 0
        req: Req = state.handle
        if state.status is not RequestStatus.WAITING:
            return self.paused_requests.needs(req)
        prefix = self._prefix_of(state)
        return self.pool.in_pages(state.kv_tokens - prefix.tokens) + prefix.evictable

    def adapter_fits(self, state: RequestState) -> bool:
        """Whether the request's LoRA adapter fits beside those in use; SGLang says so where it says
        what fits."""
        return not self.counts_kv or self.lora_slots.fits(state.handle)

    def describe_states(self) -> dict[str, int] | None:
        """For `GET /pascal/status`; None for models without recurrent layers."""
        states = self.pool.states
        if states is None:
            return None
        host = self.paused_requests.count(PauseStatus.HOST)
        return {"capacity": states.size, "free": states.free, "host": host}

    def describe_windows(self) -> dict[str, int] | None:
        """For `GET /pascal/status`; None for models without a pool for sliding windows."""
        windows = self.pool.windows
        return None if windows is None else {"capacity": windows.size, "free": windows.free}

    def _prefix_of(self, state: RequestState) -> CachedPrefix:
        """What the device has of a waiting request. A plan asks for it once per pool."""
        key = (state, state.kv_tokens, self.pool.changes)
        if self._matched is None or self._matched[0] != key:
            prefix = self.pool.cached_prefix(state.handle, state.kv_tokens - 1)
            self._matched = (key, prefix)
        return self._matched[1]

    def windows_required(self, state: RequestState) -> int:
        """Entries of sliding windows that a start takes."""
        windows = self.pool.windows
        if windows is None:
            return 0
        if state.status is not RequestStatus.WAITING:
            return self.paused_requests.needs_windows(state.handle)
        prefix = self._prefix_of(state)
        new = state.kv_tokens - prefix.tokens
        return windows.for_prefill(new, state.remaining) + prefix.evictable_windows

    def windows_reclaimable(self, state: RequestState) -> int:
        """At least how many entries of sliding windows are free once the request has left."""
        return 0 if self.pool.windows is None else self.pool.windows.held(state.handle)

    def states_required(self, state: RequestState) -> int:
        """Recurrent states that a start takes."""
        states = self.pool.states
        if states is None:
            return 0
        if state.status is not RequestStatus.WAITING:
            return self.paused_requests.needs_states(state.handle)
        return states.for_prefill

    def states_reclaimable(self, state: RequestState) -> int:
        """Recurrent states that are free or evictable once the request has left the device."""
        return self.pool.states_given_back(state.handle)

    def reclaimable(self, state: RequestState) -> int:
        """KV that is free or evictable once the request has left the device."""
        req: Req = state.handle
        return self.pool.given_back(req) if self.paused_requests.leaves_device(req) else 0
