"""The pool of layers with sliding windows, beside the one of the other layers.

An entry of the whole pool has a peer here while its token is in the window of its request. SGLang
frees the peers of what slides out; `ReqKvInfo` keeps how far it has come.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_swa_tokens
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import estimate_swa_kv_tokens
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


class Windows:
    """One scheduler's entries of sliding windows. Tokens and entries are counted in whole pages."""

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler

    @property
    def _allocator(self) -> Any:
        return self._scheduler.token_to_kv_pool_allocator

    @property
    def _tree(self) -> Any:
        return self._scheduler.tree_cache

    @property
    def _page(self) -> int:
        return self._scheduler.page_size

    @property
    def size(self) -> int:
        size: int = self._allocator.size_swa
        return size

    @property
    def free(self) -> int:
        """Entries here that are free or can be evicted from the prefix cache."""
        free: int = self._allocator.swa_available_size()
        return free + self.evictable

    @property
    def evictable(self) -> int:
        evictable: int = self._tree.swa_evictable_size()
        return evictable

    @property
    def free_whole(self) -> int:
        """The same of the whole pool."""
        free: int = self._allocator.full_available_size()
        evictable: int = self._tree.full_evictable_size()
        return free + evictable

    @property
    def most(self) -> int:
        """Entries of a paused request's window at most."""
        pages: int = -(-self._tree.swa_retain_window // self._page) + 1
        return pages * self._page

    def held(self, req: Req) -> int:
        """Entries that a request has by itself."""
        held: int = kv_private_swa_tokens(req.kv, self._page)
        return held

    def before(self, tokens: int) -> int:
        """How many of the first tokens no step sees any more in a window, of a request that has
        that many."""
        window: int = self._tree.swa_retain_window
        return max(0, tokens - window) // self._page * self._page

    def for_prefill(self, tokens: int, more: int) -> int:
        """Entries that SGLang wants to be free for a prefill of `tokens`, after which a request
        writes `more`. A chunk that the pool can never hold is made shorter."""

        def estimate(tokens: int) -> int:
            entries: int = estimate_swa_kv_tokens(
                tokens,
                more,
                sliding_window_size=self._tree.sliding_window_size,
                page_size=self._page,
                allocation_limit=self._scheduler.chunked_prefill_size,
            )
            return entries + 1

        whole = estimate(tokens)
        return whole if whole <= self.size else estimate(0) + self._page

    def peers(self, locations: torch.Tensor) -> torch.Tensor:
        """Where the peers of entries of the whole pool are."""
        peers: torch.Tensor = self._allocator.translate_loc_from_full_to_swa(locations)
        return peers

    def take(self, tokens: int, before: int) -> torch.Tensor | None:
        """Entries of the whole pool, and peers of all but the `before` first; None if there are not
        enough."""
        allocator = self._allocator
        peers = tokens - before
        whole_short = max(0, tokens - allocator.full_available_size())
        peers_short = max(0, peers - allocator.swa_available_size())
        if whole_short or peers_short:
            short = EvictParams(num_tokens=whole_short, swa_num_tokens=peers_short)
            self._tree.evict_for_alloc(short)
        if not (
            tokens <= allocator.full_available_size() and peers <= allocator.swa_available_size()
        ):
            return None
        found: torch.Tensor = allocator.full_attn_allocator.alloc(tokens)
        if peers:
            taken = allocator.swa_attn_allocator.alloc(peers)
            allocator.set_full_to_swa_mapping(found[before:], taken)
        return found


def set_before(req: Req, before: int) -> None:
    """The first `before` tokens of a request have no peers of its own."""
    req.kv.set_evicted_seqlen(ComponentType.SWA, before)


def windows_of(scheduler: SchedulerProtocol) -> Windows | None:
    """The scheduler's pool of windows; None for models without one. Exact type: what has but
    windows, or a ring of them by row, is not like this."""
    known = type(scheduler.token_to_kv_pool_allocator) is SWATokenToKVPoolAllocator
    return Windows(scheduler) if known else None
