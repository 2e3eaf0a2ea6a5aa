"""What the KV pool holds for a request, and what shared prefixes make of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.common import (
    _req_radix_key,
    evict_from_tree_cache,
    free_kv_row_segments,
    release_kv_cache,
)

from pascal_sglang import clock
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.kv_tier import Costs

# Enough that a layer's copy takes longer than its launch.
PROBE_TOKENS = 2048
PROBES = 3


class CachedPrefix(NamedTuple):
    """The part of a request that the prefix cache has on the device."""

    # Its length.
    tokens: int
    # Its node in the prefix cache.
    node: Any
    # How many of its tokens no request holds: using them takes them from what can be evicted.
    evictable: int


class Pool:
    """One scheduler's device KV: request rows, KV entries, prefix cache."""

    # A `CachedPrefix` holds while this number stays: no node was added or evicted since, and none
    # was locked or unlocked. A match may split nodes; SGLang's own locks rely on a node to go on
    # ending the same prefix then.
    changes: int

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self.scheduler = scheduler
        self.changes = 0

    @property
    def allocator(self) -> Any:
        return self.scheduler.token_to_kv_pool_allocator

    @property
    def tree(self) -> Any:
        return self.scheduler.tree_cache

    @property
    def rows(self) -> Any:
        return self.scheduler.req_to_token_pool

    @property
    def free_tokens(self) -> int:
        """KV entries that are free or can be evicted from the prefix cache."""
        free: int = self.allocator.available_size()
        evictable: int = self.tree.evictable_size()
        return free + evictable

    def in_pages(self, tokens: int) -> int:
        """`tokens` rounded up to whole pages, which is what the pool gives."""
        page: int = self.scheduler.page_size
        return -(-tokens // page) * page

    def changed(self) -> None:
        """The prefix cache may have changed: SGLang had it, or we changed it ourselves."""
        self.changes += 1

    def cached_prefix(self, req: Req, limit: int) -> CachedPrefix:
        """The longest prefix of the request, up to `limit` tokens, that the device holds."""
        ids = req.origin_input_ids + req.output_ids
        key = _req_radix_key(self.tree, req, ids, limit)
        match = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        if not match.device_prefix_len:
            return CachedPrefix(0, self.tree.root_node_handle(req.extra_key), 0)
        before = self.tree.evictable_size()
        lock = self.tree.lock(match.last_device_node)
        evictable = before - self.tree.evictable_size()
        self.tree.unlock(lock)
        return CachedPrefix(match.device_prefix_len, match.last_device_node, evictable)

    def given_back(self, req: Req) -> int:
        """KV entries that become free or evictable once the request lets go of its KV."""
        own: int = self.in_pages(req.kv.kv_allocated_len) - req.kv.cache_protected_len
        if req.lock is None:
            return own
        before = self.tree.evictable_size()
        self.tree.unlock(req.lock)
        alone: int = self.tree.evictable_size() - before
        req.lock = self.tree.lock(req.lock.node)
        return own + alone

    def locations(self, req: Req) -> torch.Tensor:
        """Where the request's KV entries are, in order; shape (committed tokens,)."""
        row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len]
        return row.clone()

    def lock(self, node: Any) -> Any:
        """Keep the prefix that ends at `node` from being evicted."""
        self.changed()
        return self.tree.lock(node)

    def unlock(self, lock: Any) -> None:
        self.changed()
        self.tree.unlock(lock)

    def release(self, req: Req) -> None:
        """Give back the row and the KV of a request that has a row."""
        self.changed()
        release_kv_cache(req, self.tree, checkpoint=False)

    def release_rowless(self, req: Req, locations: torch.Tensor) -> None:
        """The same for a request whose KV is at `locations` and whose row is given back."""
        own = req.kv.cache_protected_len
        if len(locations) > own:
            free_kv_row_segments(
                self.allocator, [(locations[own:], own)], swa_evicted_seqlen=0, swa_dead_lo=0
            )
        self.unlock(req.lock)
        req.lock = None
        req.kv.mark_kv_released()

    def give_back_ahead(self, req: Req) -> None:
        """Give back the KV entries beyond a request's tokens, which steps with drafts take ahead.
        No step that writes there is in flight."""
        begin, end = self.in_pages(req.kv.kv_committed_len), req.kv.kv_allocated_len
        if begin < end:
            self.tree.free_kv_row(req.kv, [(begin, end)])
        req.kv.kv_allocated_len = req.kv.kv_committed_len

    def take(self, tokens: int) -> torch.Tensor | None:
        """`tokens` KV entries, evicting cached prefixes as needed; None if there are not enough."""
        pages = self.in_pages(tokens)
        before = self.tree.evictable_size()
        evict_from_tree_cache(self.tree, pages)
        if self.tree.evictable_size() != before:
            self.changed()
        found = self.allocator.alloc(pages)
        return None if found is None else found[:tokens]


def measure_costs(scheduler: SchedulerProtocol, copies: HostCopies) -> Costs:
    """Time copies of KV to the host and back before the first request: one token, and many.

    The pool's content is written back as it was. Nothing is timed where nothing can be copied.
    """
    device = scheduler.device
    many = min(PROBE_TOKENS, scheduler.max_total_num_tokens, copies.room)
    if not many:
        return Costs()

    def one_way(tokens: int) -> tuple[float, float]:
        """Seconds until a copy is there, and until it is launched."""
        locations = torch.arange(1, tokens + 1, dtype=torch.int64, device=device)
        took, launched = [], []
        for _ in range(PROBES):
            begin = clock.now()
            kv = copies.to_host(locations)
            launch = clock.now() - begin
            copies.wait(kv)  # As a pause does.
            again = clock.now()
            copies.to_device(kv, locations)
            launch += clock.now() - again
            if not copies.wait(kv):
                raise RuntimeError("KV cannot be copied between the device and host memory")
            copies.free(kv)
            took.append((clock.now() - begin) / 2)
            launched.append(launch / 2)
        return min(took), min(launched)

    fixed, _ = one_way(1)
    whole, launch_s = one_way(many)
    return Costs(
        fixed,
        max(0.0, whole - fixed) / max(1, many - 1),
        launch_s=launch_s if copies.deferred else None,
    )
