"""The pause ladder: takes a running request's KV off the device and brings it back.

Rungs: KV to host memory and back without recompute; or, when the host budget is spent, drop and
recompute through the waiting queue. A request paused under overlap scheduling leaves the batch now
and gives up its KV one pass later, when its token in flight has arrived.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode


@dataclass(slots=True)
class HostCopy:
    """A paused request's KV: `tokens` entries in the pool's own host format."""

    tokens: int
    layers: Any


class Ladder:
    """Owns every request that is between the running batch and its KV's return.

    leaving: out of the batch, KV still on the device. paused: KV in host memory.
    """

    def __init__(self, scheduler: Any, host_budget_tokens: int) -> None:
        self.scheduler = scheduler
        self.host_budget_tokens = host_budget_tokens
        self.leaving: list[Req] = []
        self.paused: dict[Req, HostCopy] = {}
        self.counts: Counter[str] = Counter()

    @property
    def host_tokens(self) -> int:
        return sum(copy.tokens for copy in self.paused.values())

    @property
    def releasing_tokens(self) -> int:
        """Device KV that requests on their way out still hold."""
        return sum(req.kv.kv_committed_len for req in self.leaving)

    @property
    def free_tokens(self) -> int:
        """Device KV entries that are free or can be evicted from the prefix cache."""
        scheduler = self.scheduler
        free: int = scheduler.token_to_kv_pool_allocator.available_size()
        evictable: int = scheduler.tree_cache.evictable_size()
        return free + evictable

    def is_empty(self) -> bool:
        return not self.leaving and not self.paused

    def leave(self, reqs: list[Req], batch: ScheduleBatch) -> None:
        """Take `reqs` out of the running batch; their KV follows in `settle`."""
        batch.filter_batch(reqs_to_exclude=reqs)
        batch.batch_is_full = False
        self.leaving.extend(reqs)

    def settle(self) -> tuple[list[Req], list[Req]]:
        """Move the KV of everybody whose last token has arrived.

        Returns (paused, dropped); dropped requests must go back to the waiting queue. Requests
        that finished with their last token were released by SGLang and are forgotten.
        """
        in_flight = self._in_flight()
        still, paused, dropped = [], [], []
        host = self.host_tokens
        for req in self.leaving:
            if req in in_flight:
                still.append(req)
            elif req.finished() or not req.kv.holds_kv:
                continue
            elif host + req.kv.kv_committed_len <= self.host_budget_tokens:
                self.paused[req] = self._to_host(req)
                host += self.paused[req].tokens
                paused.append(req)
            else:
                self._drop(req)
                dropped.append(req)
        self.leaving = still
        return paused, dropped

    def _in_flight(self) -> set[Req]:
        """Requests with a forward whose result the scheduler has not processed yet."""
        queue = getattr(self.scheduler, "result_queue", None) or ()
        return {req for batch, _ in queue for req in batch.reqs}

    def _to_host(self, req: Req) -> HostCopy:
        tokens = req.kv.kv_committed_len
        rows = self.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens]
        copy = self.scheduler.token_to_kv_pool_allocator.get_cpu_copy(rows)
        self._release(req)
        req.prefix_len = 0
        req.last_node = None
        req.lock = None
        req.extend_end = None
        req.kv.cache_protected_len = 0
        req.kv.cache_inserted_len = 0
        req.kv.kv_committed_len = 0
        self.counts["host"] += 1
        self.counts["host_tokens"] += tokens
        return HostCopy(tokens, copy)

    def _drop(self, req: Req) -> None:
        self.counts["recompute"] += 1
        self.counts["recompute_tokens"] += req.kv.kv_committed_len
        self._release(req)
        req.reset_for_retract()

    def _release(self, req: Req) -> None:
        release_kv_cache(req, self.scheduler.tree_cache, checkpoint=False)

    def can_resume(self, req: Req, keep_tokens: int) -> bool:
        """Whether a row and the KV entries are to be had now, with `keep_tokens` left over."""
        return (
            self.scheduler.req_to_token_pool.available_size() > 0
            and self.free_tokens - keep_tokens >= self._in_pages(self.paused[req].tokens)
        )

    def _in_pages(self, tokens: int) -> int:
        """`tokens` rounded up to whole pages, which is what the pool gives."""
        page: int = self.scheduler.page_size
        return -(-tokens // page) * page

    def resume(self, req: Req) -> ScheduleBatch | None:
        """Bring a paused request back as a batch that decodes in the next step, without prefill.

        None, and the request stays paused, if the pool does not give what `can_resume` counted on.
        """
        if not self._to_device(req, self.paused[req]):
            return None
        del self.paused[req]
        scheduler = self.scheduler
        batch = ScheduleBatch.init_new(
            [req],
            scheduler.req_to_token_pool,
            scheduler.token_to_kv_pool_allocator,
            scheduler.tree_cache,
            scheduler.model_config,
            scheduler.enable_overlap,
            scheduler.spec_algorithm,
        )
        batch.prepare_for_prebuilt()
        batch.forward_mode = ForwardMode.DECODE
        last = torch.tensor([req.output_ids[-1]], dtype=torch.int64)
        scheduler.future_map.stash(
            batch.req_pool_indices, RelayPayload(bonus_tokens=last.to(batch.device))
        )
        self.counts["resumed"] += 1
        return batch

    def _to_device(self, req: Req, copy: HostCopy) -> bool:
        scheduler = self.scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        tokens = copy.tokens
        pages = self._in_pages(tokens)
        if scheduler.req_to_token_pool.alloc([req]) is None:
            return False
        evict_from_tree_cache(scheduler.tree_cache, pages)
        locations = allocator.alloc(pages)
        if locations is None:
            scheduler.req_to_token_pool.free(req)
            return False
        locations = locations[:tokens]
        scheduler.req_to_token_pool.write((req.kv.req_pool_idx, slice(0, tokens)), locations)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens
        req.prefix_len = 0
        req.extend_end = tokens
        root = scheduler.tree_cache.root_node_handle(req.extra_key)
        req.last_node = req.last_host_node = req.best_match_node = root
        req.num_matched_prefix_tokens = 0
        req.host_hit_length = 0
        req.refresh_fill_ids()
        allocator.load_cpu_copy(copy.layers, locations)
        return True

    def forget(self, matches: Any) -> list[Req]:
        """Let go of requests being aborted; returns them, with everything they held given back."""
        gone = [req for req in self.paused if matches(req)]
        for req in gone:
            del self.paused[req]
        for req in [r for r in self.leaving if matches(r) and r not in self._in_flight()]:
            self.leaving.remove(req)
            if not req.finished():
                self._release(req)
                gone.append(req)
        return gone
