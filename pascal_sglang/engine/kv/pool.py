"""What the KV pool holds for a request, and what shared prefixes make of it."""

from __future__ import annotations

from collections.abc import Callable
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
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from pascal_sglang import clock
from pascal_sglang.engine.kv.host_cache import HostCache, host_cache_of
from pascal_sglang.engine.kv.host_copies import HostCopies, HostCopy
from pascal_sglang.engine.kv.recurrent_states import RecurrentStates, recurrent_states_of
from pascal_sglang.engine.kv.windows import Windows, windows_of
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
    # The same of its entries of sliding windows.
    evictable_windows: int = 0


class Pool:
    """One scheduler's device KV: request rows, KV entries, those of sliding windows, recurrent
    states, prefix cache."""

    # A `CachedPrefix` holds while this number stays: no node was added or evicted since, and none
    # was locked or unlocked. A match may split nodes; SGLang's own locks rely on a node to go on
    # ending the same prefix then.
    changes: int
    # None for models without recurrent layers.
    states: RecurrentStates | None
    # None for models without a pool of their own for layers with sliding windows.
    windows: Windows | None
    # None without a hierarchical cache.
    host_cache: HostCache | None

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self.scheduler = scheduler
        self.windows = windows_of(scheduler)
        self.states = recurrent_states_of(scheduler)
        self.host_cache = host_cache_of(scheduler)
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
        if self.windows is not None:
            return self.windows.free_whole
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
        match = self._match(req, limit)
        if not match.device_prefix_len:
            return CachedPrefix(0, self.tree.root_node_handle(req.extra_key), 0)
        windows = 0 if self.windows is None else self.windows.evictable
        before = self.tree.evictable_size()
        lock = self.tree.lock(match.last_device_node)
        evictable = before - self.tree.evictable_size()
        if self.windows is not None:
            windows -= self.windows.evictable
        self.tree.unlock(lock)
        return CachedPrefix(match.device_prefix_len, match.last_device_node, evictable, windows)

    def _match(self, req: Req, limit: int) -> Any:
        ids = req.origin_input_ids + req.output_ids
        key = _req_radix_key(self.tree, req, ids, limit)
        return self.tree.match_prefix(MatchPrefixParams(key=key, req=req))

    def caches(self, req: Req, tokens: int) -> bool:
        """Whether the request's first `tokens` are on the device or in the host pool of the
        hierarchical cache."""
        match = self._match(req, tokens)
        found: bool = match.device_prefix_len + match.host_hit_length == tokens
        return found

    def load_prefix(self, req: Req, tokens: int) -> tuple[Any, Any] | None:
        """Have the hierarchical cache bring the request's first `tokens`, which it `caches`, to the
        device. Returns their last node and the event after which they are there; None if they
        cannot be had now."""
        assert self.host_cache is not None
        match = self._match(req, tokens)
        if match.device_prefix_len == tokens:
            return match.last_device_node, None
        self.changed()
        loaded = self.host_cache.load(match, req)
        return None if loaded is None else (match.best_match_node, loaded)

    def given_back(self, req: Req) -> int:
        """KV entries that become free or evictable once the request lets go of its KV."""
        own: int = self.in_pages(req.kv.kv_allocated_len) - req.kv.cache_protected_len
        return own + self._locked_alone(req, self.tree.evictable_size)

    def states_given_back(self, req: Req) -> int:
        """The same of recurrent states."""
        states = self.states
        if states is None:
            return 0
        return states.held(req) + self._locked_alone(req, lambda: states.free)

    def _locked_alone(self, req: Req, evictable: Callable[[], int]) -> int:
        """How much more can be evicted without the request's lock on its prefix."""
        if req.lock is None:
            return 0
        before = evictable()
        self.tree.unlock(req.lock)
        alone = evictable() - before
        node, apart = req.lock.node, req.lock.swa_released
        # A request whose window has left its prefix does not hold that part any more.
        req.lock = self.tree.lock(node, (ComponentType.SWA,)) if apart else self.tree.lock(node)
        return alone

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
                self.allocator,
                [(locations[own:], own)],
                swa_evicted_seqlen=req.kv.get_evicted_seqlen(ComponentType.SWA),
                swa_dead_lo=req.kv.swa_dead_lo(self.scheduler.page_size),
            )
        if self.states is not None:
            self.states.release(req)
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

    def take_row(self, req: Req) -> bool:
        """Give the request a row, and what it has no longer of recurrent states."""
        if self.states is not None:
            self.changed()
            if not self.states.make_room(req):
                return False
        return self.rows.alloc([req]) is not None

    def take_state(self) -> torch.Tensor | None:
        """A slot for a recurrent state, evicting cached ones as needed; None if there is none."""
        assert self.states is not None
        self.changed()
        return self.states.take()

    def take(self, tokens: int, before: int = 0) -> torch.Tensor | None:
        """`tokens` KV entries, evicting cached prefixes as needed; None if there are not enough.
        The first `before` come without entries of sliding windows."""
        pages = self.in_pages(tokens)
        if self.windows is not None:
            self.changed()
            taken = self.windows.take(pages, before)
            return None if taken is None else taken[:tokens]
        before = self.tree.evictable_size()
        evict_from_tree_cache(self.tree, pages)
        if self.tree.evictable_size() != before:
            self.changed()
        found = self.allocator.alloc(pages)
        return None if found is None else found[:tokens]

    def give_windows(self, locations: torch.Tensor) -> None:
        """Give back the entries of sliding windows of whole pages of KV, which stay."""
        if self.windows is not None and len(locations):
            self.allocator.free_swa(locations)

    def give(self, locations: torch.Tensor, before: int = 0) -> None:
        """Give back what `take` gave."""
        free_kv_row_segments(
            self.allocator, [(locations, 0)], swa_evicted_seqlen=before, swa_dead_lo=0
        )


def measure_costs(scheduler: SchedulerProtocol, copies: HostCopies) -> Costs:
    """Time copies of KV to the host and back before the first request: one token, and many; each
    with a state and a window, if there are.

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
            copy = HostCopy(tokens, 0, None, copies.to_host(locations))
            if copies.states is not None:
                copy.state = copies.states.to_host(locations[:1])
            if copies.windows is not None:
                copy.window = copies.windows.to_host(locations[: copies.window_tokens])
            launch = clock.now() - begin
            parts = copies.parts_of(copy)
            for owner, part in parts:
                owner.wait(part)  # As a pause does.
            again = clock.now()
            for owner, part in parts:
                owner.to_device(part, locations[: part.tokens])
            launch += clock.now() - again
            complete = [owner.wait(part) for owner, part in parts]
            if not all(complete):
                raise RuntimeError("KV cannot be copied between the device and host memory")
            for owner, part in parts:
                owner.free(part)
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
