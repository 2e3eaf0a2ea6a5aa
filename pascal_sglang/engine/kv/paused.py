"""Paused requests: takes a running request's KV off the device and brings it back.

Tiers, cheapest first: the request gives back its slot and its KV stays; KV to host memory and back
without recompute; or drop and recompute through the waiting queue. A request paused under overlap
scheduling leaves the batch now and its KV follows one pass later, when its token in flight has
arrived. Where copies run beside the decoding, its device memory is free once the copy is complete,
and a request whose KV comes back joins the batch then; all ranks learn of both in the same pass
(`transfers`). Copies are waited for only where memory is needed at once, or nothing else is to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.engine.kv.decode_batch import decoding, joined
from pascal_sglang.engine.kv.drafts import DraftState, carries, state_in_batch, state_in_row
from pascal_sglang.engine.kv.host_cache import HeldPrefix
from pascal_sglang.engine.kv.host_copies import HostCopies, HostCopy
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.pool import CachedPrefix, Pool
from pascal_sglang.engine.kv.recurrent_states import bind
from pascal_sglang.engine.kv.transfers import Transfer, Transfers
from pascal_sglang.engine.kv.windows import set_before
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.policy.kv_tier import Costs, KVTier


class PauseStatus(Enum):
    """Where a request is between the running batch and its KV's return.

    | status | the request | on | becomes |
    |---|---|---|---|
    | none | runs | `leave` | LEAVING |
    | none | comes from another instance | `adopt` | RESIDENT |
    | LEAVING | is out of the batch, its KV untouched | `finish_pauses` | RESIDENT, HOST or none |
    | RESIDENT | has its KV on the device and no row | `resume` | ARRIVING |
    | RESIDENT | | `spill`, and `finish_pauses` | HOST or none |
    | none | waits, and sets out for another instance | `set_out` | DROPPED |
    | HOST | has its KV in host memory | `resume` | ARRIVING |
    | ARRIVING | has a row again, and KV or a copy of it under way | `arrive` | none: it runs |
    | any | is aborted, ended or retracted | `let_go` | none; DROPPED while it migrates |
    | DROPPED | migrates, and its KV here is gone | `end_migration` | none |

    From LEAVING, RESIDENT and HOST a request becomes "none" when its KV is to be recomputed: it
    waits in SGLang's queue then. One whose KV is not recomputed (`RequestState.recomputes`) becomes
    or stays RESIDENT instead.
    """

    LEAVING = "leaving"
    RESIDENT = "resident"
    HOST = "host"
    ARRIVING = "arriving"
    DROPPED = "dropped"


# In this order all ranks walk the requests that hold something here.
HOLDING = (PauseStatus.RESIDENT, PauseStatus.HOST, PauseStatus.ARRIVING, PauseStatus.LEAVING)


@dataclass(slots=True, eq=False)
class Paused:
    """What is known of one request that is here."""

    status: PauseStatus
    # LEAVING: the tier it was told; None for the cheapest off the device.
    tier: KVTier | None = None
    # RESIDENT: where on the device its KV is.
    locations: torch.Tensor | None = None
    # HOST: its KV. ARRIVING: the copy it comes from; None for one that was RESIDENT. LEAVING and
    # RESIDENT: the copy that has begun.
    copy: HostCopy | None = None
    # The copy that is under way in LEAVING, RESIDENT and ARRIVING.
    transfer: Transfer | None = None
    # HOST: its shared prefix as last matched, and `Pool.changes` then.
    prefix: CachedPrefix | None = None
    matched_at: int = -1
    # The state of its draft model; None without one, and in LEAVING until its last step is over.
    drafted: DraftState | None = None


class PausedRequests:
    """Owns every request that is between the running batch and its KV's return."""

    # Tokens whose KV is in host memory.
    host_tokens: int
    # Pauses and KV entries by tier, spills, resumes, copies that failed.
    counts: Counter[str]

    def __init__(self, scheduler: SchedulerProtocol, copies: HostCopies, costs: Costs) -> None:
        self.scheduler = scheduler
        self.pool = Pool(scheduler)
        self.copies = copies
        self.transfers = Transfers(scheduler)
        self.costs = costs
        self.host_tokens = 0
        self._drafts = carries(scheduler)
        self.counts = Counter()
        # Resident requests that were told to spill.
        self._spilling: dict[Req, None] = {}
        self._table: dict[Req, Paused] = {}
        # The requests of `_table` by status, in the order in which they entered it.
        self._by_status: dict[PauseStatus, dict[Req, None]] = {s: {} for s in PauseStatus}
        # Those that leave for another instance; they are not brought back meanwhile.
        self._migrating: dict[Req, None] = {}

    def in_status(self, *statuses: PauseStatus) -> list[Req]:
        """The requests in these statuses, one status after the other, each in the order of entry.
        All ranks share this order."""
        return [req for status in statuses for req in self._by_status[status]]

    def count(self, *statuses: PauseStatus) -> int:
        """How many requests are in these statuses."""
        return sum(len(self._by_status[status]) for status in statuses)

    def status_of(self, req: Req) -> PauseStatus | None:
        """None for a request that is not here."""
        paused = self._table.get(req)
        return None if paused is None else paused.status

    def copy_of(self, req: Req) -> HostCopy:
        """The KV of a request in HOST, or what it comes back from in ARRIVING."""
        copy = self._table[req].copy
        assert copy is not None
        return copy

    def locations_of(self, req: Req) -> torch.Tensor:
        """Where on the device the KV of a request in RESIDENT is."""
        locations = self._table[req].locations
        assert locations is not None
        return locations

    def drafted(self, req: Req) -> DraftState | None:
        """The state of the draft model of a paused request; None without one."""
        return self._table[req].drafted

    def _enter(
        self,
        req: Req,
        status: PauseStatus,
        *,
        tier: KVTier | None = None,
        locations: torch.Tensor | None = None,
        copy: HostCopy | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        """The request is in `status` from now on, and in no other."""
        before = self._table.get(req)
        drafted = None
        if before is not None:
            del self._by_status[before.status][req]
            drafted = before.drafted
        self._table[req] = Paused(status, tier, locations, copy, transfer, drafted=drafted)
        self._by_status[status][req] = None

    def _remove(self, req: Req) -> None:
        """The request is not here any more."""
        paused = self._table.pop(req)
        del self._by_status[paused.status][req]
        self._migrating.pop(req, None)

    def _remove_kv(self, req: Req) -> None:
        """The request's KV is given back; one that migrates stays here until that is over."""
        if req in self._migrating:
            self._enter(req, PauseStatus.DROPPED)
        else:
            self._remove(req)

    def begin_migration(self, req: Req) -> None:
        """A request that is here leaves for another instance."""
        assert req in self._table
        self._migrating[req] = None

    def set_out(self, req: Req) -> None:
        """A request that has no KV, and is in no queue any more, leaves for another instance."""
        self._enter(req, PauseStatus.DROPPED)
        self.begin_migration(req)

    def end_migration(self, req: Req) -> None:
        """The request leaves for no other instance, or has left."""
        paused = self._table.get(req)
        if paused is None:
            return
        self._migrating.pop(req, None)
        if paused.status is PauseStatus.DROPPED:
            self._remove(req)

    def is_migrating(self, req: Req) -> bool:
        return req in self._migrating

    @property
    def releasing_tokens(self) -> int:
        """Device KV that requests on their way out will give back."""
        return sum(req.kv.kv_allocated_len for req in self._giving_back())

    @property
    def releasing_states(self) -> int:
        """Recurrent states that requests on their way out will give back."""
        states = self.pool.states
        return 0 if states is None else sum(map(states.held, self._giving_back()))

    @property
    def releasing_windows(self) -> int:
        """Entries of sliding windows that requests on their way out will give back."""
        windows = self.pool.windows
        return 0 if windows is None else sum(map(windows.held, self._giving_back()))

    def _giving_back(self) -> Iterator[Req]:
        """The requests on their way out that will not stay on the device."""
        for req in self._by_status[PauseStatus.LEAVING]:
            paused = self._table[req]
            if paused.tier is not KVTier.RESIDENT and (
                paused.copy is not None or self.leaves_device(req)
            ):
                yield req

    def paused(self) -> Iterator[Req]:
        """The paused requests whose KV can be brought back."""
        for req in self.in_status(PauseStatus.RESIDENT, PauseStatus.HOST):
            if req not in self._migrating:
                yield req

    def paused_count(self) -> int:
        """How many `paused` yields."""
        kept = (PauseStatus.RESIDENT, PauseStatus.HOST)
        leaving = sum(self._table[req].status in kept for req in self._migrating)
        return self.count(*kept) - leaving

    def is_empty(self) -> bool:
        """Whether no request holds KV here."""
        return not self.count(*HOLDING)

    def leave(
        self, reqs: Iterable[Req], batch: ScheduleBatch, tier: Callable[[Req], KVTier | None]
    ) -> None:
        """Take `reqs` out of the running batch; their KV follows in `finish_pauses`."""
        leaving = {req: tier(req) for req in reqs}
        # Under overlap the state is that of the step before the one in flight.
        drafted = {}
        if self._drafts and not self.scheduler.enable_overlap:
            drafted = {req: state_in_batch(req, batch) for req in leaving}
        batch.filter_batch(reqs_to_exclude=list(leaving))
        batch.batch_is_full = False
        for req, told in leaving.items():
            self._enter(req, PauseStatus.LEAVING, tier=told)
            self._table[req].drafted = drafted.get(req)

    def finish_pauses(self, *, wait: bool = False) -> Iterator[tuple[Req, KVTier]]:
        """Handle the KV of everybody whose last token has arrived, and of those that spill; yields
        each with the tier that it has gone to. wait: for copies that are under way, too.

        Who is dropped for recompute has to go back to the waiting queue. Requests that finished
        with their last token were released by SGLang and are forgotten.
        """
        leaving = self._by_status[PauseStatus.LEAVING]
        if not leaving and not self._spilling:
            return
        in_flight = self._in_flight() if leaving else set()
        going = [req for req in leaving if req not in in_flight]
        with self.copies.together():
            for req in going:
                self._begin_pause(req)
        spilling = [req for req in self._spilling if self.is_spilling(req)]
        if wait or not self.copies.deferred:
            under_way = [self._table[req].transfer for req in (*going, *spilling)]
            self.transfers.finish(*(transfer for transfer in under_way if transfer is not None))
        for req in going:
            paused = self._table[req]
            if paused.transfer is not None and paused.transfer.complete is None:
                continue
            if req.finished() or not req.kv.holds_kv:
                self._drop_copy(req)
                self._remove_kv(req)
                continue
            tier = paused.tier
            if tier is not KVTier.RESIDENT:
                tier = self._off_device(req, req.kv.kv_committed_len, self.pool.release)
            if tier is KVTier.RESIDENT:
                self.pool.give_back_ahead(req)
                self._enter(req, PauseStatus.RESIDENT, locations=self.pool.locations(req))
                self.pool.rows.free(req)
                self._count(tier, req.kv.kv_committed_len)
            yield req, tier
        for req in spilling:
            transfer = self._table[req].transfer
            if transfer is None or transfer.complete is None:
                continue
            tier = self._spilled(req)
            if tier is not KVTier.RESIDENT:
                yield req, tier
        self._spilling = {req: None for req in spilling if self.is_spilling(req)}

    def _begin_pause(self, req: Req) -> None:
        """The last token of a request has arrived: its KV may be copied."""
        paused = self._table[req]
        if paused.transfer is not None or req.finished() or not req.kv.holds_kv:
            return
        if paused.tier is KVTier.RESIDENT and self.copies.by_row:
            paused.tier = None
        if self._drafts and paused.drafted is None:
            paused.drafted = state_in_row(req, self.scheduler)
        if paused.tier is not KVTier.RESIDENT:
            self._begin_copy(req, self.pool.locations(req), paused.tier)

    def is_spilling(self, req: Req) -> bool:
        """Whether the request is resident and a copy of its KV is under way."""
        paused = self._table.get(req)
        resident = paused is not None and paused.status is PauseStatus.RESIDENT
        return resident and paused is not None and paused.transfer is not None

    def begin_spills(self, reqs: Iterable[Req]) -> None:
        """Begin the copies of resident requests that are to `spill` now, all together."""
        with self.copies.together():
            for req in reqs:
                if self._table[req].transfer is None:
                    self._begin_copy(req, self.locations_of(req), None)

    def spill(self, req: Req, *, wait: bool = True, at_any_price: bool = False) -> KVTier:
        """Take the KV of a resident request off the device; returns the tier it went to, which is
        RESIDENT if the KV can neither go to host memory nor, but `at_any_price`, be recomputed.
        Unless asked to `wait`, it is RESIDENT, too, while a copy is under way: `finish_pauses` says
        what came of it."""
        paused = self._table[req]
        if paused.transfer is None:
            self._begin_copy(req, self.locations_of(req), None)
        transfer = paused.transfer
        if transfer is not None and transfer.complete is None:
            if not wait and self.copies.deferred:
                self._spilling[req] = None
                return KVTier.RESIDENT
            self.transfers.finish(transfer)
        return self._spilled(req, recomputes=at_any_price)

    def _spilled(self, req: Req, *, recomputes: bool = False) -> KVTier:
        """A resident request's copy is complete, or there is none: give back its device memory."""
        locations = self.locations_of(req)
        tier = self._off_device(
            req,
            len(locations),
            lambda r: self.pool.release_rowless(r, locations),
            recomputes=recomputes,
        )
        self.counts["spilled"] += tier is not KVTier.RESIDENT
        return tier

    def leaves_device(self, req: Req) -> bool:
        """Whether a pause of the running request, or a spill of the resident one, can free its
        memory."""
        fits = req.kv.kv_committed_len <= self.copies.room
        return self._recomputes(req) or fits or self.is_spilling(req)

    def _recomputes(self, req: Req) -> bool:
        """Whether the request's KV may be dropped. A part that the pool holds by the row is lost
        with the row in any case."""
        return state_of(req).recomputes or self.copies.by_row

    def _begin_copy(self, req: Req, locations: torch.Tensor, tier: KVTier | None) -> bool:
        """Copy the KV to the host if that is the tier and there is room; False where it is to be
        recomputed."""
        tokens, room = len(locations), self.copies.room
        if tier is None and not state_of(req).recomputes:
            tier = KVTier.HOST
        shared = min(req.kv.cache_protected_len, tokens)
        held = self._hold_prefix(req, shared, tier)
        copied = tokens if held is None else tokens - shared
        if (tier or self.costs.cheapest(copied, room)) is not KVTier.HOST or copied > room:
            if held is not None and self.pool.host_cache is not None:
                self.pool.host_cache.release(held)
            return False
        copy = self.copies.save(req, locations, held)
        paused = self._table[req]
        paused.copy, paused.transfer = copy, self.transfers.begin(self.copies.parts_of(copy))
        self.host_tokens += copied
        self.counts["held_tokens"] += tokens - copied
        return True

    def _hold_prefix(self, req: Req, shared: int, tier: KVTier | None) -> HeldPrefix | None:
        """Have the hierarchical cache hold the request's prefix of `shared` tokens, if it can on
        every rank."""
        host_cache = self.pool.host_cache
        if host_cache is None or not shared or tier is KVTier.RECOMPUTE:
            return None
        held = host_cache.hold(req.lock.node) if req.lock is not None else None
        if all_agree(self.scheduler, held is not None):
            return held
        if held is not None:
            host_cache.release(held)
        return None

    def _off_device(
        self, req: Req, tokens: int, release: Callable[[Req], None], *, recomputes: bool = False
    ) -> KVTier:
        """Give back the device KV of a request, whose copy has begun if there is one. RESIDENT if
        there is none and the KV is not recomputed: nothing has changed then."""
        copied = self._has_copy(req)
        if not copied and not (recomputes or self._recomputes(req)):
            return KVTier.RESIDENT
        release(req)
        if not copied:
            req.reset_for_retract()
            self._remove_kv(req)
            self._count(KVTier.RECOMPUTE, tokens)
            return KVTier.RECOMPUTE
        req.prefix_len = 0
        req.last_node = None
        req.lock = None
        req.extend_end = None
        req.kv.cache_protected_len = 0
        req.kv.cache_inserted_len = 0
        req.kv.kv_committed_len = 0
        self._enter(req, PauseStatus.HOST, copy=self._table[req].copy)
        self._count(KVTier.HOST, tokens)
        return KVTier.HOST

    def _has_copy(self, req: Req) -> bool:
        """Whether there is a copy, complete on every rank: one that failed would leave that rank
        alone in prefilling the request again."""
        paused = self._table[req]
        transfer, paused.transfer = paused.transfer, None
        if transfer is None:
            return False
        if transfer.complete:
            return True
        self.counts["copy_failed"] += 1
        self._drop_copy(req)
        return False

    def _drop_copy(self, req: Req) -> None:
        """Give back the host memory of a request's copy, if it has one."""
        paused = self._table[req]
        copy, paused.copy, paused.transfer = paused.copy, None, None
        if copy is not None:
            self.host_tokens -= copy.copied
            if copy.held is not None and self.pool.host_cache is not None:
                self.pool.host_cache.release(copy.held)
            for copies, part in self.copies.parts_of(copy):
                copies.free(part)

    def _count(self, tier: KVTier, tokens: int) -> None:
        self.counts[tier.value] += 1
        self.counts[f"{tier.value}_tokens"] += tokens

    def _in_flight(self) -> set[Req]:
        """Requests with a forward whose result the scheduler has not processed yet."""
        queue = getattr(self.scheduler, "result_queue", None) or ()
        return {req for batch, _ in queue for req in batch.reqs}

    def can_resume(self, req: Req, keep_tokens: int, keep_windows: int = 0) -> bool:
        """Whether all that the request needs is to be had now, with `keep_tokens` KV entries and
        `keep_windows` of sliding windows left over."""
        if not self.pool.rows.available_size():
            return False
        states = self.pool.states
        if states is not None and states.free < self.needs_states(req):
            return False
        windows = self.pool.windows
        if windows is not None and windows.free - keep_windows < self.needs_windows(req):
            return False
        return self.pool.free_tokens - keep_tokens >= self.needs(req)

    def needs_states(self, req: Req) -> int:
        """Slots of recurrent states that bringing a paused request back takes."""
        states, status = self.pool.states, self.status_of(req)
        if states is not None and status is PauseStatus.HOST:
            return states.for_resume(shares_prefix=self.copy_of(req).shared > 0)
        if states is not None and status is PauseStatus.RESIDENT:
            return states.for_return(req)
        return 0

    def needs_windows(self, req: Req) -> int:
        """Entries of sliding windows that bringing a paused request back takes."""
        if self.pool.windows is None or self.status_of(req) is not PauseStatus.HOST:
            return 0
        copy = self.copy_of(req)
        whole = self.pool.in_pages(copy.tokens)
        if copy.shared:
            prefix = self._shared_prefix(req, copy)
            if prefix.tokens == copy.shared:
                return whole - max(copy.before, copy.shared) + prefix.evictable_windows
        return whole - copy.before

    def needs(self, req: Req) -> int:
        """KV entries that bringing a paused request back takes from what is free or evictable."""
        if self.status_of(req) is not PauseStatus.HOST:
            return 0
        copy = self.copy_of(req)
        whole = self.pool.in_pages(copy.tokens)
        if not copy.shared:
            return whole
        prefix = self._shared_prefix(req, copy)
        if copy.held is None and prefix.tokens < copy.shared:
            return whole
        return whole - prefix.tokens + prefix.evictable

    def _shared_prefix(self, req: Req, copy: HostCopy) -> CachedPrefix:
        """What the device still has of the prefix that the request shared. The plan's match is
        carried to the resume, unless the prefix cache has changed since."""
        paused = self._table[req]
        if paused.prefix is None or paused.matched_at != self.pool.changes:
            paused.prefix = self.pool.cached_prefix(req, copy.shared)
            paused.matched_at = self.pool.changes
        return paused.prefix

    def resume(self, req: Req) -> bool:
        """Bring a paused request back: it is ARRIVING, and `arrive` puts it into the running batch,
        in which it decodes without prefill.

        False if the pool does not give what `can_resume` counted on, and the request stays paused,
        or if the hierarchical cache has lost a prefix, and the request is to be recomputed: nothing
        `holds` it.
        """
        if self.status_of(req) is PauseStatus.RESIDENT:
            if not self.pool.take_row(req):
                return False
            self._drop_copy(req)
            locations = self.locations_of(req)
            self.pool.rows.write((req.kv.req_pool_idx, slice(0, len(locations))), locations)
            self._enter(req, PauseStatus.ARRIVING)
            self.counts["resumed"] += 1
            return True
        copy = self.copy_of(req)
        if copy.held is not None and not self._has_held_prefix(req, copy):
            self.counts["lost_prefixes"] += 1
            self._recompute(req, copy)
            return False
        if not self._to_device(req, copy):
            return False
        # Its memory may be written by the copies that come after this one.
        self._drop_copy(req)
        transfer = self.transfers.begin(self.copies.parts_of(copy))
        self._enter(req, PauseStatus.ARRIVING, copy=copy, transfer=transfer)
        self.counts["resumed"] += 1
        return True

    def arrive(
        self, running: ScheduleBatch, lost: Callable[[Req], None], *, wait: bool = False
    ) -> ScheduleBatch:
        """The running batch with the requests that were arriving and whose KV is there. lost: told
        of each whose KV could not be copied back, and which holds nothing any more. wait: for
        copies that are under way, too."""
        arriving = self.in_status(PauseStatus.ARRIVING)
        if not arriving:
            return running
        under_way = [t for req in arriving if (t := self._table[req].transfer) is not None]
        if wait or not self.copies.deferred:
            self.transfers.finish(*under_way)
        joining = []
        for req in arriving:
            paused = self._table[req]
            complete = True if paused.transfer is None else paused.transfer.complete
            if complete is None:
                continue
            if complete:
                joining.append(req)
                continue
            assert paused.copy is not None
            self._give_up(req, paused.copy)
            lost(req)
        if not joining:
            return running
        drafted = [self._table[req].drafted for req in joining]
        running = joined(running, decoding(joining, self.scheduler, drafted))
        for req in joining:
            self._remove(req)
        return running

    def holds(self, req: Req) -> bool:
        """Whether the request is paused and has KV."""
        return self.status_of(req) in (PauseStatus.RESIDENT, PauseStatus.HOST)

    def _has_held_prefix(self, req: Req, copy: HostCopy) -> bool:
        return all_agree(self.scheduler, self.pool.caches(req, copy.shared))

    def _give_up(self, req: Req, copy: HostCopy) -> None:
        """Give back all that a request holds whose copy did not reach the device on every rank."""
        for copies, part in self.copies.parts_of(copy):
            copies.wait(part)  # Nothing may write there once it is given back.
        self.pool.release(req)
        self.counts["copy_failed"] += 1
        self._remove(req)
        req.reset_for_retract()
        self._count(KVTier.RECOMPUTE, copy.tokens)

    def _recompute(self, req: Req, copy: HostCopy) -> None:
        """Give up a copy that does not bring its request back."""
        self._drop_copy(req)
        self._remove(req)
        req.reset_for_retract()
        self._count(KVTier.RECOMPUTE, copy.tokens)

    def _hold_steps(self, copy: HostCopy) -> None:
        for copies, part in self.copies.parts_of(copy):
            copies.hold_steps(part)

    def _to_device(self, req: Req, copy: HostCopy) -> bool:
        pool, tokens = self.pool, copy.tokens
        node, shared = pool.tree.root_node_handle(req.extra_key), 0
        if copy.held is not None:
            found = pool.load_prefix(req, copy.shared)
            if found is None:
                return False
            node, loaded = found
            shared = copy.shared
            # Also those of others who share it, before this request joins them.
            self.copies.hold_steps(HostKV([], loaded))
            self.counts["loaded_prefixes"] += loaded is not None
        elif copy.shared:
            prefix = self._shared_prefix(req, copy)
            # All of the shared prefix or none: the copy comes in two parts.
            if prefix.tokens == copy.shared:
                node, shared = prefix.node, copy.shared
        lock = pool.lock(node) if shared else None  # Before anything is evicted.
        before = max(0, copy.before - shared)
        own = pool.take(tokens - shared, before)
        if own is None or not pool.take_row(req):
            if own is not None:
                pool.give(own, before)
            if lock is not None:
                pool.unlock(lock)
            return False
        locations = own
        if shared:
            path = pool.tree.path_device_indices(node)[:shared]
            locations = torch.cat([path.to(own.dtype), own])
        pool.rows.write((req.kv.req_pool_idx, slice(0, tokens)), locations)
        self._bind_kv(req, tokens, shared, node, lock)
        if before:
            set_before(req, copy.before)
        self.copies.load(req, copy, locations, shared)
        return True

    def _bind_kv(self, req: Req, tokens: int, shared: int, node: Any, lock: Any) -> None:
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
        return set(self._table)

    def let_go(self, req: Req) -> None:
        """Give back what a request holds. Its step must not be in flight."""
        paused = self._table.get(req)
        if paused is None:
            return
        if paused.status is PauseStatus.RESIDENT:
            self._drop_copy(req)
            self.pool.release_rowless(req, self.locations_of(req))
        elif paused.status is PauseStatus.ARRIVING:
            # Who gets its memory next writes there after the copy.
            if paused.copy is not None:
                self._hold_steps(paused.copy)
            self.pool.release(req)
        elif paused.status is PauseStatus.LEAVING:
            self._drop_copy(req)
            if not req.finished() and req.kv.holds_kv:
                self.pool.release(req)
        else:
            self._drop_copy(req)
        self._remove_kv(req)

    def adopt(
        self,
        req: Req,
        locations: torch.Tensor,
        before: int = 0,
        state: torch.Tensor | None = None,
        drafted: DraftState | None = None,
    ) -> None:
        """Take in a paused request from elsewhere, whose KV is at `locations` on the device, the
        first `before` without entries of sliding windows. state: the slot of its recurrent state.
        drafted: the state of its draft model. Each if there is one."""
        root = self.pool.tree.root_node_handle(req.extra_key)
        self._bind_kv(req, len(locations), 0, root, None)
        if before:
            set_before(req, before)
        if state is not None:
            bind(req, state)
        self._enter(req, PauseStatus.RESIDENT, locations=locations)
        self._table[req].drafted = drafted

    def forget(self, matches: Callable[[Req], bool]) -> list[Req]:
        """Let go of requests being aborted; returns them. One in flight stays: its result, which
        is due, ends it."""
        in_flight = self._in_flight()
        return self._clear(
            req
            for req in self.in_status(*HOLDING)
            if matches(req) and req not in in_flight and req not in self._migrating
        )

    def drop(self) -> list[Req]:
        """Drop all KV, because it is no longer valid; returns whose it was. No step is in flight.

        A request handed over to another instance stays here, in DROPPED.
        """
        dropped = self._clear(self.in_status(*HOLDING))
        for req in dropped:
            req.reset_for_retract()
        self.counts["retracted"] += len(dropped)
        return dropped

    def _clear(self, reqs: Iterable[Req]) -> list[Req]:
        """Let go of them; returns those that have not ended with their last token."""
        for req in (going := list(reqs)):
            self.let_go(req)
        return [req for req in going if not req.finished()]
