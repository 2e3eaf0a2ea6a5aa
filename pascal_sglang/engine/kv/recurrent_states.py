"""The slots of recurrent states (Mamba, GDN): one of constant size for each request that runs.

The prefix cache holds slots too: the states at the ends of cached prefixes. SGLang takes a slot for
a request together with its row, and assumes that there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_mamba_slots
from sglang.srt.mem_cache.allocation import ensure_mamba_capacity
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, MambaPool

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol

# Slots that a prefill takes besides the request's own: the copy that the prefix cache keeps, and
# the state of the prefix that it goes on from, which cannot be evicted meanwhile.
IN_PREFILL = 2


class RecurrentStates:
    """One scheduler's slots.

    buffers: what a slot is made of, each of shape (slots, ...); None if it is more than we know.
    size: their number.
    """

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        self.buffers = _buffers_of(self._rows)
        self.size: int = self._rows.mamba_allocator.size

    @property
    def _rows(self) -> Any:
        return self._scheduler.req_to_token_pool

    @property
    def _tree(self) -> Any:
        return self._scheduler.tree_cache

    @property
    def free(self) -> int:
        """Slots that may be given: free ones, and those that can be evicted from the prefix cache;
        without those that prefills under way will take."""
        free: int = self._rows.mamba_allocator.schedulable_available_size() - self._promised
        # Cached states may be in a pool of their own (`--enable-int8-mamba-checkpoint`).
        if not self._caches or self._rows.mamba_ckpt_pool is not None:
            return free
        evictable: int = self._tree.mamba_evictable_size()
        return free + evictable

    @property
    def _promised(self) -> int:
        """A slot for each request whose prefill, or a chunk of it, is under way: the prefix cache
        gets a copy at its end, and SGLang takes it for granted that there is one."""
        if not self._caches:
            return 0
        scheduler = self._scheduler
        in_flight = getattr(scheduler, "result_queue", None) or ()
        ending = {req for b, _ in in_flight if b.forward_mode.is_extend() for req in b.reqs}
        if scheduler.chunked_req is not None:
            ending.add(scheduler.chunked_req)
        return len(ending)

    @property
    def for_prefill(self) -> int:
        """Slots that are needed to begin a prefill."""
        return self.for_row + (IN_PREFILL if self._caches else 0)

    def for_resume(self, *, shares_prefix: bool) -> int:
        """Slots that are needed to bring a request back whose state is in host memory."""
        return self.for_row + shares_prefix

    def for_return(self, req: Req) -> int:
        """The same of a request whose state is on the device: those that track it, if it came
        without from elsewhere."""
        tracked = req.kv.mamba_ping_pong_track_buffer is not None
        return 0 if tracked else self.for_row - 1

    @property
    def _caches(self) -> bool:
        """Whether the prefix cache holds states."""
        caches: bool = self._tree.supports_prefix_sharing() and self._tree.supports_mamba()
        return caches

    @property
    def for_row(self) -> int:
        """Slots of a request that runs: its state, and those that track it for the prefix
        cache."""
        tracking: int = self._rows.mamba_initial_tracking_slots
        return 1 + tracking

    @staticmethod
    def held(req: Req) -> int:
        """Slots that a request holds by itself."""
        slots: int = kv_mamba_slots(req.kv)
        return slots

    @staticmethod
    def location(req: Req) -> torch.Tensor:
        """The slot of a request's state, shape (1,)."""
        return req.kv.mamba_pool_idx.view(1)

    def make_room(self, req: Req) -> bool:
        """Evict cached states until a request without a row can be given one; False if that is not
        enough."""
        enough: bool = ensure_mamba_capacity(self._rows, [req], self._tree)
        return enough

    def take(self) -> torch.Tensor | None:
        """A slot for a state from elsewhere, shape (1,), evicting cached states as needed; None if
        there is none."""
        allocator = self._rows.mamba_allocator
        if not allocator.schedulable_available_size() and self._caches:
            self._tree.evict_for_alloc(EvictParams(num_tokens=0, mamba_num=1))
        slot: torch.Tensor | None = allocator.alloc(1)
        return slot

    def give(self, slot: torch.Tensor) -> None:
        """Give back what `take` gave."""
        self._rows.mamba_allocator.free(slot)

    def release(self, req: Req) -> None:
        """Give back the slots of a request that has no row."""
        kv, allocator = req.kv, self._rows.mamba_allocator
        allocator.free(self.location(req))
        if kv.mamba_ping_pong_track_buffer is not None:
            taken = [i for i, empty in enumerate(kv.mamba_ping_pong_empty) if not empty]
            allocator.free(kv.mamba_ping_pong_track_buffer[taken])
        forget(req)


def bind(req: Req, slot: torch.Tensor) -> None:
    """The request has its state in the slot, shape (1,)."""
    req.kv.mamba_pool_idx = slot[0]


def forget(req: Req) -> None:
    """The request has no slots any more, and no part of it is tracked."""
    kv = req.kv
    kv.mamba_pool_idx = None
    kv.mamba_ping_pong_track_buffer = kv.mamba_ping_pong_empty = None
    kv.mamba_next_track_idx = kv.mamba_last_track_idx = None
    kv.mamba_last_track_seqlen = kv.mamba_prev_track_seqlen = None
    kv.mamba_untracked_decode_batch_idx = None
    kv.mamba_cow_src_index = None
    kv.mamba_needs_clear = False


def recurrent_states_of(scheduler: SchedulerProtocol) -> RecurrentStates | None:
    """The scheduler's slots; None for models without recurrent layers."""
    has = isinstance(scheduler.req_to_token_pool, HybridReqToTokenPool)
    return RecurrentStates(scheduler) if has else None


def _buffers_of(rows: Any) -> list[torch.Tensor] | None:
    """Exact types: what a subclass adds would be left behind, and so would what SGLang keeps beside
    a state (draft steps, updates not yet applied, other kinds of state)."""
    pool = rows.mamba_pool
    if type(rows) is not HybridReqToTokenPool or type(pool) is not MambaPool:
        return None
    cache = pool.mamba_cache
    known = type(cache) is MambaPool.State and pool.replayssm_write_pos is None
    if not known or pool._slot_siblings or rows.mamba_ckpt_pool is not None:
        return None
    return [state.transpose(0, 1) for state in (*cache.conv, cache.temporal)]
