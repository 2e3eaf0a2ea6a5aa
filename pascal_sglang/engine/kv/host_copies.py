"""KV, windows and recurrent states between the device's pools and host memory: beside the decoding
on CUDA, at once elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from pascal_sglang.engine.kv import drafts
from pascal_sglang.engine.kv.copy_stream import CopyStream, copy_stream_of
from pascal_sglang.engine.kv.entry_kernels import EntryKernel, kernel_for
from pascal_sglang.engine.kv.host_cache import HeldPrefix
from pascal_sglang.engine.kv.host_kv import HostKV, joined
from pascal_sglang.engine.kv.pinning import on_own_pages, pin, unpin
from pascal_sglang.engine.kv.range_allocator import RangeAllocator
from pascal_sglang.engine.kv.recurrent_states import RecurrentStates, recurrent_states_of
from pascal_sglang.engine.kv.windows import windows_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import ERRORS_LOGGED

logger = logging.getLogger(__name__)

# Entries gathered at a time: what one layer of them takes on the device is all that a copy needs.
CHUNK = 2048


@dataclass(slots=True)
class HostCopy:
    """A paused request's KV in host memory, in the pool's own format.

    shared: leading tokens that stood in the prefix cache; `prefix` holds these, `own` the rest.
    held: the prefix, where the hierarchical cache has it in host memory; `prefix` is None then.
    state: its recurrent state, for models that have them. before: leading tokens that no layer with
    a sliding window sees any more; `window_prefix` holds the rest of the shared ones in the pool of
    such layers, `window` that of the others.
    """

    tokens: int
    shared: int
    prefix: HostKV | None
    own: HostKV | None
    held: HeldPrefix | None = None
    state: HostKV | None = None
    before: int = 0
    window_prefix: HostKV | None = None
    window: HostKV | None = None

    @property
    def copied(self) -> int:
        """Tokens whose KV was copied."""
        return self.tokens if self.held is None else self.tokens - self.shared

    def halves(self) -> list[HostKV]:
        return [half for half in (self.prefix, self.own) if half is not None]

    def window_halves(self) -> list[HostKV]:
        """The same of the entries of sliding windows, from the token `before` on."""
        return [half for half in (self.window_prefix, self.window) if half is not None]


class Way(NamedTuple):
    """How entries are copied."""

    # To the host; else to the device.
    out: bool
    # After the steps launched so far.
    after_steps: bool


# Host memory, and where on the device the entries are or go.
Pair = tuple[HostKV, torch.Tensor]


class EntryCopies:
    """Host memory for entries of one device pool, and the copies there and back.

    All of the memory is taken at the start, and on CUDA pinned: pinning costs seconds for tens of
    GB, holds the device up, and fails, if it does, before anybody is served. On CUDA a copy runs on
    a stream of its own while the next steps decode: `deferred` says that whoever asked for it must
    know that it is complete before the entries are freed (`Transfers`: all ranks in the same pass).
    The stream keeps copies in order, so memory that has been given back may be written by the next
    one at once.

    buffers: the pool's, and those of a draft model's pool, each of shape (entries, ...); None if
    these entries are not copied. capacity: entries that the memory holds.
    """

    capacity: int = 0

    def __init__(
        self, buffers: list[torch.Tensor] | None, stream: CopyStream, *, pins: bool
    ) -> None:
        """pins: whether the device reads and writes pinned memory by itself."""
        self.buffers = buffers
        self._memory: list[torch.Tensor] = []
        self._places = RangeAllocator(0)
        self._stream = stream
        self.deferred = stream.deferred
        self._pins = pins
        self._kernel: EntryKernel | None = None
        self._failures = 0
        # Inside of `together`: what is to begin at its end, in order.
        self._gathered: list[tuple[Way, list[Pair]]] | None = None

    @property
    def bytes_per_entry(self) -> int:
        """What one entry takes on the device; 0 if entries are not copied."""
        # Not by the pool's own figure: until CUDA graphs are captured that is an upper bound.
        return sum(buffer[0].nbytes for buffer in self.buffers or ())

    @property
    def reserved_bytes(self) -> int:
        """Host memory that has been taken."""
        return sum(block.nbytes for block in self._memory)

    @property
    def room(self) -> int:
        """Entries of the largest copy that the memory has room for."""
        return self._places.free

    def reserve(self, entries: int) -> None:
        """Take host memory for that many. Raises: RuntimeError if there is not enough."""
        if self.buffers is None:
            return
        for buffer in self.buffers:
            # Not torch.empty with pin_memory=True: that rounds up to a power of two.
            block = on_own_pages((entries, *buffer.shape[1:]), buffer.dtype)
            if self._pins and block.nbytes and (failed := pin(block.data_ptr(), block.nbytes)):
                size = entries * self.bytes_per_entry / 2**30
                raise RuntimeError(
                    f"cannot pin {size:.1f} GiB of host memory for paused KV "
                    f"(CUDA error {failed}); lower --pascal-host-kv-gb"
                )
            self._memory.append(block)
        self._places = RangeAllocator(entries)
        self.capacity = entries
        if self._pins and entries:
            self._kernel = kernel_for(self.buffers, self._memory)

    def take(self, entries: int) -> HostKV:
        """Memory for that many entries, at most `room`, into which nothing is copied yet."""
        ranges = self._places.take(entries)
        if ranges is None or self.buffers is None:
            raise RuntimeError(f"no host memory for {entries} entries")
        return HostKV(self._memory, ranges=ranges, pinned=self._pins)

    def to_host(self, locations: torch.Tensor) -> HostKV:
        """Begin to copy the entries at `locations`, shape (entries,), at most `room` of them, which
        no step in flight writes. If the device fails, `wait` says so; until the copy is freed its
        memory is taken, as it is on ranks that did not fail."""
        return self.read(locations, self.take(len(locations)))

    def read(self, locations: torch.Tensor, kv: HostKV, *, after_steps: bool = False) -> HostKV:
        """Begin to copy the entries at `locations`, as `to_host` does, into memory of the caller's
        choice. after_steps: a step in flight may write them, and is waited for."""
        self._begin(Way(out=True, after_steps=after_steps), kv, locations)
        return kv

    @contextmanager
    def together(self) -> Iterator[None]:
        """Copies from and to `take`'s memory that are asked for inside begin at the end: those of
        one way that follow each other by one launch, with one event. Until then none of them may be
        waited for, asked about or held for."""
        assert self._gathered is None
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            for way, pairs in gathered:
                self._launch(way, pairs)

    def _begin(self, way: Way, kv: HostKV, locations: torch.Tensor) -> None:
        gathered = self._gathered
        if gathered is None or kv.parts is not self._memory:
            self._launch(way, [(kv, locations)])
        elif gathered and gathered[-1][0] == way:
            gathered[-1][1].append((kv, locations))
        else:
            gathered.append((way, [(kv, locations)]))

    def _launch(self, way: Way, pairs: Sequence[Pair]) -> None:
        """Begin copies of one way at once. Where that fails they are begun one by one: the device
        may have memory for some of them."""
        kept = [kv for kv, _ in pairs]
        whole = joined(kept) if len(pairs) > 1 else kept[0]
        kernel = self._kernel_for(whole)
        copy: Callable[[HostKV, torch.Tensor], None]
        if kernel is None:
            copy = partial(_copy_out if way.out else _copy_in, self.buffers)
        else:
            copy = kernel.copy_out if way.out else kernel.copy_in
        try:
            where = torch.cat([locations for _, locations in pairs]) if pairs[1:] else pairs[0][1]
            # Request rows are int32, of which each index into a buffer would make an int64 again.
            where = where.to(torch.int64)
            done = self._stream.run(partial(copy, whole, where), where, after_steps=way.after_steps)
        except Exception:  # Whatever it is that a kernel raises: the other ranks wait for a word.
            if len(pairs) == 1:
                self._failed(kept[0])
            else:
                for pair in pairs:
                    self._launch(way, [pair])
            return
        for kv in kept:
            kv.done = done

    def _kernel_for(self, kv: HostKV) -> EntryKernel | None:
        """What copies to or from there by one launch; None if PyTorch does."""
        kernel = self._kernel
        return kernel if kernel is not None and kernel.takes(kv) else None

    def _failed(self, kv: HostKV) -> None:
        kv.failed = True
        self._failures += 1
        if self._failures <= ERRORS_LOGGED:
            logger.exception("pascal_sglang: copying KV between device and host failed")

    def wait(self, kv: HostKV) -> bool:
        """Until the copy is complete; False if the device failed. The first failures are logged."""
        try:
            if kv.done is not None:
                kv.done.synchronize()
        except RuntimeError:
            self._failed(kv)
        kv.done = None
        return not kv.failed

    def query(self, kv: HostKV) -> bool | None:
        """The same without waiting; None while the copy is under way."""
        try:
            if kv.done is not None and not kv.done.query():
                return None
        except RuntimeError:
            self._failed(kv)
        kv.done = None
        return not kv.failed

    def to_device(self, kv: HostKV, locations: torch.Tensor) -> None:
        """Begin to write the entries to `locations`. Steps see them once `wait` has returned or
        after `hold_steps`; until then the host memory is read. If the device fails, `kv.failed` and
        `wait` say so."""
        # A step in flight may still write entries that have just been freed and given to us.
        self._begin(Way(out=False, after_steps=True), kv, locations)

    def hold_steps(self, kv: HostKV) -> None:
        """Have steps launched from now on wait for the copy, if it is not complete by then."""
        if kv.done is not None:
            self._stream.hold_steps(kv.done)

    def free(self, kv: HostKV) -> None:
        """Give the host memory of a copy back, complete or not."""
        assert kv.ranges is not None
        self._places.give(kv.ranges)


class HostCopies(EntryCopies):
    """The copies of KV entries, and with them those of recurrent states.

    kept: whether KV is copied at all. buffers: those of the draft model's pool too; None also if KV
    is useless without a state or a window that is not copied. states: the copies of states; None
    for models without recurrent layers. windows: the copies of entries in the pool of layers with
    sliding windows; None for models without one.
    """

    states: EntryCopies | None
    windows: EntryCopies | None
    # Whether the pool holds a part of a request by its row: without a row it would be lost.
    by_row = False

    def __init__(self, scheduler: SchedulerProtocol, *, kept: bool = True) -> None:
        self._scheduler = scheduler
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        buffers = _buffers_of(pool) if kept else None
        slots = recurrent_states_of(scheduler)
        if slots is not None and slots.buffers is None:
            buffers = None
        self._window_pool = windows_of(scheduler)
        window_buffers = None
        if kept and self._window_pool is not None and type(pool) is SWAKVPool:
            window_buffers = _buffers_of(pool.swa_kv_pool)
            buffers = window_buffers and _buffers_of(pool.full_kv_pool)
        plain = slots is None and self._window_pool is None
        buffers = _with_drafts(buffers, scheduler, plain=plain)
        stream = copy_stream_of(scheduler) if buffers else CopyStream()
        pins = str(scheduler.device).startswith("cuda")
        super().__init__(buffers, stream, pins=pins)
        self.states = self.windows = None
        if buffers is not None and window_buffers is not None:
            self.windows = EntryCopies(window_buffers, stream, pins=pins)
        if buffers is not None and slots is not None:
            self.states = EntryCopies(slots.buffers, stream, pins=pins)
        self._unpinned = False

    @property
    def copies(self) -> bool:
        """Whether KV is copied at all, or recomputed."""
        return self.buffers is not None

    @property
    def bytes_per_token(self) -> int:
        """What one KV entry takes in this rank's device pool."""
        if self.buffers is not None:
            return self.bytes_per_entry
        scheduler = self._scheduler
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        return int(pool.mem_usage * 2**30 / max(1, scheduler.max_total_num_tokens))

    @property
    def room(self) -> int:
        """Tokens of the largest copy that the memory has room for."""
        if self.states is not None and not self.states.room:
            return 0
        if self.windows is not None and self.windows.room < self.window_tokens:
            return 0
        return self._places.free

    @property
    def reserved_bytes(self) -> int:
        """Host memory that has been taken."""
        beside = (self.states, self.windows)
        return super().reserved_bytes + sum(c.reserved_bytes for c in beside if c is not None)

    @property
    def window_tokens(self) -> int:
        """Entries of sliding windows that a paused request has at most."""
        return 0 if self._window_pool is None else self._window_pool.most

    @contextmanager
    def together(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(super().together())
            for beside in (self.states, self.windows):
                if beside is not None:
                    stack.enter_context(beside.together())
            yield

    def beside(self) -> EntryCopies:
        """More host memory for plain KV, apart from this. Copies of both run in one order."""
        return EntryCopies(self.buffers, self._stream, pins=self._pins)

    def window_peers(self, locations: torch.Tensor) -> torch.Tensor:
        """Where in the pool for sliding windows the entries of those at `locations` are."""
        assert self._window_pool is not None
        return self._window_pool.peers(locations)

    def save(self, req: Req, locations: torch.Tensor, held: HeldPrefix | None = None) -> HostCopy:
        """Begin to copy what a request has, its KV at `locations`, as `to_host` does, but for a
        prefix that the hierarchical cache holds."""
        tokens = len(locations)
        shared = min(req.kv.cache_protected_len, tokens)
        # Where all of it is, before any is copied: what fails here leaves nothing under way.
        state = None if self.states is None else RecurrentStates.location(req)
        before = 0
        peers: torch.Tensor | None = None
        if self._window_pool is not None and self.windows is not None:
            before = self._window_pool.before(tokens)
            peers = self._window_pool.peers(locations[before:])
        prefix = self.to_host(locations[:shared]) if shared and held is None else None
        own = self.to_host(locations[shared:]) if shared < tokens else None
        copy = HostCopy(tokens, shared, prefix, own, held, before=before)
        if self.states is not None and state is not None:
            copy.state = self.states.to_host(state)
        if self.windows is not None and peers is not None:
            split = max(0, shared - before)
            if split:
                copy.window_prefix = self.windows.to_host(peers[:split])
            if split < len(peers):
                copy.window = self.windows.to_host(peers[split:])
        return copy

    def load(self, req: Req, copy: HostCopy, locations: torch.Tensor, shared: int) -> None:
        """Begin to write what a request has, its KV to `locations`, as `to_device` does. The first
        `shared` tokens are there."""
        # As in `save`.
        state: torch.Tensor | None = None
        peers: torch.Tensor | None = None
        if copy.state is not None and self.states is not None:
            state = RecurrentStates.location(req)
        if self._window_pool is not None and self.windows is not None:
            peers = self._window_pool.peers(locations[copy.before :])
        if copy.prefix is not None and not shared:
            self.to_device(copy.prefix, locations[: copy.shared])
        if copy.own is not None:
            self.to_device(copy.own, locations[copy.shared :])
        if copy.state is not None and self.states is not None and state is not None:
            # A new slot is cleared in the next step otherwise.
            req.kv.mamba_needs_clear = False
            self.states.to_device(copy.state, state)
        if self.windows is not None and peers is not None:
            split = max(0, copy.shared - copy.before)
            if copy.window_prefix is not None and not shared:
                self.windows.to_device(copy.window_prefix, peers[:split])
            if copy.window is not None:
                self.windows.to_device(copy.window, peers[split:])

    def parts_of(self, copy: HostCopy) -> list[tuple[EntryCopies, HostKV]]:
        """The parts of a request's copy, each with whose memory it is in."""
        parts: list[tuple[EntryCopies, HostKV]] = [(self, half) for half in copy.halves()]
        if self.states is not None and copy.state is not None:
            parts.append((self.states, copy.state))
        if self.windows is not None:
            parts += [(self.windows, part) for part in copy.window_halves()]
        return parts

    @property
    def slots_pinned(self) -> bool:
        """Whether the device reads and writes what moves use by itself."""
        return self._pins and not self._unpinned

    def pin(self, memory: memoryview) -> None:
        """Have the device read and write `memory` by itself; if it cannot be pinned, which is
        logged once, copies from and to there are waited for."""
        if not self._pins:
            return
        block = torch.frombuffer(memory, dtype=torch.uint8)
        failed = pin(block.data_ptr(), block.nbytes)
        if failed and not self._unpinned:
            self._unpinned = True
            logger.warning(
                "pascal_sglang: cannot pin %d bytes for moves (CUDA error %d), which are slower so",
                memory.nbytes,
                failed,
            )

    def unpin(self, memory: memoryview) -> None:
        """The reverse of `pin`, before the memory is given back. No copy there is under way."""
        if self._pins:
            unpin(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())


def _copy_out(buffers: list[torch.Tensor] | None, kv: HostKV, locations: torch.Tensor) -> None:
    """Entries of a pool to host memory, a launch or two per buffer."""
    assert buffers is not None
    for at, first, last in kv.runs(CHUNK):
        where = locations[at : at + last - first]
        for buffer, part in zip(buffers, kv.parts, strict=True):
            if buffer.device == part.device:
                torch.index_select(buffer, 0, where, out=part[first:last])
            else:
                part[first:last].copy_(buffer[where], non_blocking=True)


def _copy_in(buffers: list[torch.Tensor] | None, kv: HostKV, locations: torch.Tensor) -> None:
    """The reverse."""
    assert buffers is not None
    for at, first, last in kv.runs(CHUNK):
        where = locations[at : at + last - first]
        for buffer, part in zip(buffers, kv.parts, strict=True):
            buffer[where] = part[first:last].to(buffer.device, non_blocking=True)


def _with_drafts(
    buffers: list[torch.Tensor] | None, scheduler: SchedulerProtocol, *, plain: bool
) -> list[torch.Tensor] | None:
    """The buffers with those of the draft model's pools; None where KV is not all that there is of
    a request."""
    if buffers is None or not drafts.drafts(scheduler):
        return buffers
    if not plain or not drafts.carries(scheduler):
        return None
    found = list(buffers)
    for pool in drafts.draft_pools(scheduler):
        more = _buffers_of(pool)
        if more is None:
            return None
        found += more
    return found


def _buffers_of(pool: Any) -> list[torch.Tensor] | None:
    """The pool's buffers, each of shape (entries, ...); None for pools that hold more than that
    (scales, index keys), or where an entry is not a row of each. Exact types: what a subclass adds
    would be left behind."""
    if type(pool) is MHATokenToKVPool:
        plain = pool.kv_cache_layout == "nhd" and not pool.is_quantized_kv_cache
        return [*pool.k_buffer, *pool.v_buffer] if plain else None
    if type(pool) is HybridLinearKVPool:  # Its other layers have states.
        return _buffers_of(pool.full_kv_pool)
    if type(pool) is MLATokenToKVPool:
        plain = pool._write_loc_dcp_span == 1 and pool.kv_scale_buffer is None
        return [buffer for buffer in pool.kv_buffer if buffer.shape[0]] if plain else None
    return None
