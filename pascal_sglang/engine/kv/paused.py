"""Paused requests: takes a running request's KV off the device and brings it back.

Rungs, cheapest first: the request gives back its slot and its KV stays; KV to host memory and back
without recompute; or drop and recompute through the waiting queue. A request paused under overlap
scheduling leaves the batch now and its KV follows one pass later, when its token in flight has
arrived. Where copies run beside the decoding, its device memory is free one pass after that, and a
request whose KV comes back joins the batch a pass after the copy began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.decode_batch import decoding, joined
from pascal_sglang.engine.kv.host_copies import HostCopies, HostCopy
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.policy.kv_tier import Costs, KVTier


class PausedRequests:
    """Owns every request that is between the running batch and its KV's return.

    leaving: out of the batch, its KV not yet handled; the tier it was told, or None for the
    cheapest off the device. copying: who of them is being copied to the host since the last pass.
    resident: where on the device the KV is. host: its copy. arriving: who has a row and device
    memory again, and joins the batch in the next pass; the copy it comes from.
    moving: those of them that leave for another instance; nobody brings them back meanwhile.
    counts: pauses and KV entries by tier, spills, resumes, copies that failed.
    """

    def __init__(self, scheduler: Any, copies: HostCopies, costs: Costs) -> None:
        self.scheduler = scheduler
        self.pool = Pool(scheduler)
        self.copies = copies
        self.costs = costs
        self.leaving: dict[Req, KVTier | None] = {}
        self.copying: dict[Req, HostCopy] = {}
        self.resident: dict[Req, torch.Tensor] = {}
        self.host: dict[Req, HostCopy] = {}
        self.arriving: dict[Req, HostCopy] = {}
        self.host_tokens = 0
        self.moving: set[Req] = set()
        self.counts: Counter[str] = Counter()

    @property
    def releasing_tokens(self) -> int:
        """Device KV that requests on their way out will give back."""
        return sum(
            req.kv.kv_committed_len
            for req, tier in self.leaving.items()
            if tier is not KVTier.RESIDENT
        )

    def paused(self) -> Iterator[Req]:
        """Everybody paused whose KV can be brought back."""
        for req in (*self.resident, *self.host):
            if req not in self.moving:
                yield req

    def is_empty(self) -> bool:
        return not (self.leaving or self.resident or self.host or self.arriving)

    def leave(
        self, reqs: Iterable[Req], batch: ScheduleBatch, tier: Callable[[Req], KVTier | None]
    ) -> None:
        """Take `reqs` out of the running batch; their KV follows in `settle`."""
        leaving = {req: tier(req) for req in reqs}
        batch.filter_batch(reqs_to_exclude=list(leaving))
        batch.batch_is_full = False
        self.leaving.update(leaving)

    def settle(self) -> Iterator[tuple[Req, KVTier]]:
        """Handle the KV of everybody whose last token has arrived; yields each with its tier.

        Who is dropped for recompute has to go back to the waiting queue. Requests that finished
        with their last token were released by SGLang and are forgotten.
        """
        if not self.leaving:
            return
        in_flight = self._in_flight()
        for req, tier in list(self.leaving.items()):
            if req in in_flight:
                continue
            if req.finished() or not req.kv.holds_kv:
                del self.leaving[req]
                self._drop_copy(self.copying, req)
                continue
            if tier is KVTier.RESIDENT:
                self.resident[req] = self.pool.locations(req)
                self.pool.rows.free(req)
                self._count(tier, req.kv.kv_committed_len)
            else:
                tokens = req.kv.kv_committed_len
                started = req in self.copying
                begun = not started and self._begin_copy(req, self.pool.locations(req), tier)
                if begun and self.copies.deferred:
                    continue
                tier = self._off_device(req, tokens, self.pool.release)
            del self.leaving[req]
            yield req, tier

    def spill(self, req: Req) -> KVTier:
        """Take the KV of a resident request off the device; returns the tier it went to."""
        locations = self.resident[req]
        self._begin_copy(req, locations, None)
        tier = self._off_device(
            req, len(locations), lambda r: self.pool.release_rowless(r, locations)
        )
        del self.resident[req]
        self.counts["spilled"] += 1
        return tier

    def _begin_copy(self, req: Req, locations: torch.Tensor, tier: KVTier | None) -> bool:
        """Copy the KV to the host if that is the tier and there is room; False where it is to be
        recomputed."""
        tokens, room = len(locations), self.copies.room
        if (tier or self.costs.cheapest(tokens, room)) is not KVTier.HOST or tokens > room:
            return False
        shared = min(req.kv.cache_protected_len, tokens)
        prefix = self.copies.to_host(locations[:shared]) if shared else None
        own = self.copies.to_host(locations[shared:]) if shared < tokens else None
        self.copying[req] = HostCopy(tokens, shared, prefix, own)
        self.host_tokens += tokens
        return True

    def _off_device(self, req: Req, tokens: int, release: Callable[[Req], None]) -> KVTier:
        """Give back the device KV of a request, whose copy is in `copying` if there is one."""
        copied = self._await_copy(req)
        release(req)
        if not copied:
            req.reset_for_retract()
            self._count(KVTier.RECOMPUTE, tokens)
            return KVTier.RECOMPUTE
        req.prefix_len = 0
        req.last_node = None
        req.lock = None
        req.extend_end = None
        req.kv.cache_protected_len = 0
        req.kv.cache_inserted_len = 0
        req.kv.kv_committed_len = 0
        self.host[req] = self.copying.pop(req)
        self._count(KVTier.HOST, tokens)
        return KVTier.HOST

    def _await_copy(self, req: Req) -> bool:
        """Whether there is a copy, complete on every rank: one that failed would leave that rank
        alone in prefilling the request again."""
        copy = self.copying.get(req)
        if copy is None:
            return False
        complete = [self.copies.wait(half) for half in copy.halves()]
        if all_agree(self.scheduler, all(complete)):
            return True
        self.counts["copy_failed"] += 1
        self._drop_copy(self.copying, req)
        return False

    def _drop_copy(self, copies: dict[Req, HostCopy], req: Req) -> None:
        copy = copies.pop(req, None)
        if copy is not None:
            self.host_tokens -= copy.tokens
            for half in copy.halves():
                self.copies.free(half)

    def _count(self, tier: KVTier, tokens: int) -> None:
        self.counts[tier.value] += 1
        self.counts[f"{tier.value}_tokens"] += tokens

    def _in_flight(self) -> set[Req]:
        """Requests with a forward whose result the scheduler has not processed yet."""
        queue = getattr(self.scheduler, "result_queue", None) or ()
        return {req for batch, _ in queue for req in batch.reqs}

    def can_resume(self, req: Req, keep_tokens: int) -> bool:
        """Whether a row and the KV entries are to be had now, with `keep_tokens` left over."""
        if not self.pool.rows.available_size():
            return False
        return self.pool.free_tokens - keep_tokens >= self.needs(req)

    def needs(self, req: Req) -> int:
        """KV entries that bringing a paused request back takes from what is free or evictable."""
        copy = self.host.get(req)
        if copy is None:
            return 0
        whole = self.pool.in_pages(copy.tokens)
        if not copy.shared:
            return whole
        held = self.pool.held(req, copy.shared)
        return whole if held.tokens < copy.shared else whole - held.tokens + held.evictable

    def resume(self, req: Req, running: ScheduleBatch) -> ScheduleBatch | None:
        """Bring a paused request back; the running batch, in which it decodes without prefill in
        the next step, or in the one after that if it is `arriving` while others decode.

        None if the pool does not give what `can_resume` counted on, and the request stays paused,
        or if a rank's device fails, and the request is to be recomputed: nothing `holds` it.
        """
        if req in self.resident:
            if self.pool.rows.alloc([req]) is None:
                return None
            locations = self.resident.pop(req)
            self.pool.rows.write((req.kv.req_pool_idx, slice(0, len(locations))), locations)
        else:
            copy = self.host[req]
            if not self._to_device(req, copy):
                return None
            if not all_agree(self.scheduler, not copy.failed):
                self._give_up(req, copy)
                return None
            self._drop_copy(self.host, req)
            self.arriving[req] = copy
        self.counts["resumed"] += 1
        if req not in self.arriving:
            return joined(running, decoding(req, self.scheduler))
        return running if self.copies.deferred and running.reqs else self.arrive(running)

    def arrive(self, running: ScheduleBatch) -> ScheduleBatch:
        """The running batch with everybody who was arriving."""
        for req, copy in list(self.arriving.items()):
            self._hold_steps(copy)
            running = joined(running, decoding(req, self.scheduler))
            del self.arriving[req]
        return running

    def holds(self, req: Req) -> bool:
        """Whether the request is paused and has KV."""
        return req in self.resident or req in self.host

    def _give_up(self, req: Req, copy: HostCopy) -> None:
        """Give back all that a request holds whose copy did not reach the device on every rank."""
        for half in copy.halves():
            self.copies.wait(half)  # Nothing may write there once it is given back.
        self.pool.release(req)
        self.counts["copy_failed"] += 1
        self._drop_copy(self.host, req)
        req.reset_for_retract()
        self._count(KVTier.RECOMPUTE, copy.tokens)

    def _hold_steps(self, copy: HostCopy) -> None:
        for half in copy.halves():
            self.copies.hold_steps(half)

    def _to_device(self, req: Req, copy: HostCopy) -> bool:
        pool, tokens = self.pool, copy.tokens
        held = pool.held(req, copy.shared)
        # All of the shared prefix or none: the copy comes in two parts.
        shared = copy.shared if held.tokens == copy.shared else 0
        node = held.node if shared else pool.tree.root_node_handle(req.extra_key)
        if pool.rows.alloc([req]) is None:
            return False
        lock = pool.tree.lock(node) if shared else None  # Before anything is evicted.
        own = pool.take(tokens - shared)
        if own is None:
            pool.tree.unlock(lock)
            pool.rows.free(req)
            return False
        locations = own
        if shared:
            path = pool.tree.path_device_indices(node)[:shared]
            locations = torch.cat([path.to(own.dtype), own])
        pool.rows.write((req.kv.req_pool_idx, slice(0, tokens)), locations)
        self._stands_at(req, tokens, shared, node, lock)
        if copy.prefix is not None and not shared:
            self.copies.to_device(copy.prefix, locations[: copy.shared])
        if copy.own is not None:
            self.copies.to_device(copy.own, locations[copy.shared :])
        return True

    def _stands_at(self, req: Req, tokens: int, shared: int, node: Any, lock: Any) -> None:
        """The request holds `tokens` KV entries, the first `shared` of them the prefix cache's."""
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens
        req.kv.cache_protected_len = req.prefix_len = shared
        req.extend_end = tokens
        req.last_node = req.last_host_node = req.best_match_node = node
        req.lock = lock
        req.num_matched_prefix_tokens = 0
        req.host_hit_length = 0
        req.refresh_fill_ids()

    def held(self) -> set[Req]:
        """Every request here, and those handed over to another instance that may come back."""
        return {*self._places(), *self.moving}

    def _places(self) -> tuple[Req, ...]:
        """Every request here, in an order that all ranks share."""
        return (*self.resident, *self.host, *self.arriving, *self.leaving)

    def let_go(self, req: Req) -> None:
        """Give back what a request holds. Its step must not be in flight."""
        if req in self.resident:
            self.pool.release_rowless(req, self.resident.pop(req))
        elif req in self.arriving:
            # Who gets its memory next writes there after the copy.
            self._hold_steps(self.arriving.pop(req))
            self.pool.release(req)
        elif req in self.leaving:
            del self.leaving[req]
            self._drop_copy(self.copying, req)
            if not req.finished() and req.kv.holds_kv:
                self.pool.release(req)
        else:
            self._drop_copy(self.host, req)

    def adopt(self, req: Req, locations: torch.Tensor) -> None:
        """Take in a paused request from elsewhere, whose KV is at `locations` on the device."""
        root = self.pool.tree.root_node_handle(req.extra_key)
        self._stands_at(req, len(locations), 0, root, None)
        self.resident[req] = locations

    def forget(self, matches: Callable[[Req], bool]) -> list[Req]:
        """Let go of requests being aborted; returns them. One in flight stays: its result, which
        is due, ends it."""
        stays = self._in_flight() | self.moving
        return self._clear(r for r in self._places() if matches(r) and r not in stays)

    def drop(self) -> list[Req]:
        """Drop all KV, because it is no longer valid; returns whose it was. No step is in flight.

        A request handed over to another instance stays in `moving`, without KV.
        """
        dropped = self._clear(self._places())
        for req in dropped:
            req.reset_for_retract()
        self.counts["retracted"] += len(dropped)
        return dropped

    def _clear(self, reqs: Iterable[Req]) -> list[Req]:
        """Let go of them; returns those that have not ended with their last token."""
        for req in (going := list(reqs)):
            self.let_go(req)
        return [req for req in going if not req.finished()]
