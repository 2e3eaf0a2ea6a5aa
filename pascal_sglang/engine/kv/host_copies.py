"""KV between the device pool and host memory: beside the decoding on CUDA, at once elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from pascal_sglang.engine.kv import drafts
from pascal_sglang.engine.kv.copy_stream import CopyStream, copy_stream_of
from pascal_sglang.engine.kv.pinning import pin
from pascal_sglang.engine.kv.range_allocator import RangeAllocator
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import ERRORS_LOGGED

logger = logging.getLogger(__name__)

# Tokens gathered at a time: what one layer of them takes on the device is all that a copy needs.
CHUNK = 8192


@dataclass(slots=True)
class HostKV:
    """KV of some tokens in host memory, in the pool's own format.

    parts: one tensor per buffer of the pool, shape (tokens, ...). done: the event after which they
    are complete; None if they are. start: where they are in the memory of `HostCopies`; None
    elsewhere. failed: the device did not copy them.
    """

    parts: list[torch.Tensor]
    done: Any = None
    start: int | None = None
    failed: bool = False

    @property
    def tokens(self) -> int:
        return len(self.parts[0])


@dataclass(slots=True)
class HostCopy:
    """A paused request's KV in host memory, in the pool's own format.

    shared: leading tokens that stood in the prefix cache; `prefix` holds these, `own` the rest.
    """

    tokens: int
    shared: int
    prefix: HostKV | None
    own: HostKV | None

    def halves(self) -> list[HostKV]:
        return [half for half in (self.prefix, self.own) if half is not None]

    @property
    def failed(self) -> bool:
        """Whether the device did not copy all of it."""
        return any(half.failed for half in self.halves())


class HostCopies:
    """Host memory for KV entries of one device pool, and the copies there and back.

    All of the memory is taken at the start, and on CUDA pinned: pinning costs seconds for tens of
    GB, holds the device up, and fails, if it does, before anybody is served. On CUDA a copy runs on
    a stream of its own, layer by layer, while the next step decodes: `deferred` says that whoever
    asked for it must `wait` before the entries are freed. Every rank waits in the same pass,
    whatever its event says, so that ranks go on alike. The stream keeps copies in order, so memory
    that has been given back may be written by the next one at once.

    buffers: the pool's, and those of the draft model's pool, each of shape (entries, ...); None for
    pools whose KV is not copied but recomputed.
    """

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        self.buffers = _all_buffers(scheduler)
        self._memory: list[torch.Tensor] = []
        self._pieces = RangeAllocator(0)
        self._stream = copy_stream_of(scheduler) if self.buffers else CopyStream()
        self.deferred = self._stream.deferred
        self._pins = str(scheduler.device).startswith("cuda")
        self._unpinned = False
        self._failures = 0

    @property
    def copies(self) -> bool:
        """Whether KV is copied at all, or recomputed."""
        return self.buffers is not None

    @property
    def bytes_per_token(self) -> int:
        """What one KV entry takes in this rank's device pool."""
        scheduler = self._scheduler
        if self.buffers is None:
            pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
            return int(pool.mem_usage * 2**30 / max(1, scheduler.max_total_num_tokens))
        # Not by the pool's own figure: until CUDA graphs are captured that is an upper bound.
        return sum(buffer[0].nbytes for buffer in self.buffers)

    @property
    def room(self) -> int:
        """Tokens of the largest copy that the memory has room for."""
        return self._pieces.largest

    def reserve(self, tokens: int) -> None:
        """Take host memory for `tokens` KV entries. Raises: RuntimeError if there is not enough."""
        if self.buffers is None:
            return
        for buffer in self.buffers:
            block = torch.empty((tokens, *buffer.shape[1:]), dtype=buffer.dtype)
            # Not pin_memory=True: that rounds up to a power of two.
            if self._pins and block.nbytes and (failed := pin(block.data_ptr(), block.nbytes)):
                size = tokens * self.bytes_per_token / 2**30
                raise RuntimeError(
                    f"cannot pin {size:.1f} GiB of host memory for paused KV "
                    f"(CUDA error {failed}); lower --pascal-host-kv-gb"
                )
            self._memory.append(block)
        self._pieces = RangeAllocator(tokens)

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

    def to_host(self, locations: torch.Tensor) -> HostKV:
        """Begin to copy the entries at `locations`, shape (tokens,), at most `room` of them, which
        no step in flight writes. If the device fails, `wait` says so; until the copy is freed its
        memory is taken, as it is on ranks that did not fail."""
        tokens = len(locations)
        start = self._pieces.take(tokens)
        if start is None or self.buffers is None:
            raise RuntimeError(f"no host memory for {tokens} KV entries")
        kv = HostKV([block[start : start + tokens] for block in self._memory], start=start)
        return self.read(locations, kv)

    def read(self, locations: torch.Tensor, kv: HostKV) -> HostKV:
        """Begin to copy the entries at `locations`, as `to_host` does, into memory of the caller's
        choice."""
        buffers = self.buffers
        assert buffers is not None

        def copy() -> None:
            for buffer, part in zip(buffers, kv.parts, strict=True):
                for some in _chunks(len(locations)):
                    part[some].copy_(buffer[locations[some]], non_blocking=True)

        self._begin(kv, copy, locations, after_steps=False)
        return kv

    def _begin(
        self, kv: HostKV, copy: Callable[[], None], locations: torch.Tensor, *, after_steps: bool
    ) -> None:
        try:
            kv.done = self._stream.run(copy, locations, after_steps=after_steps)
        except RuntimeError:
            self._failed(kv)

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

    def to_device(self, kv: HostKV, locations: torch.Tensor) -> None:
        """Begin to write the entries to `locations`. Steps see them once `wait` has returned or
        after `hold_steps`; until then the host memory is read. If the device fails, `kv.failed` and
        `wait` say so."""
        buffers = self.buffers
        assert buffers is not None

        def copy() -> None:
            for buffer, part in zip(buffers, kv.parts, strict=True):
                for some in _chunks(kv.tokens):
                    buffer[locations[some]] = part[some].to(buffer.device, non_blocking=True)

        # A step in flight may still write entries that have just been freed and given to us.
        self._begin(kv, copy, locations, after_steps=True)

    def save(self, req: Req, locations: torch.Tensor) -> HostCopy:
        """Begin to copy a request's KV, which is at `locations`, as `to_host` does."""
        tokens = len(locations)
        shared = min(req.kv.cache_protected_len, tokens)
        prefix = self.to_host(locations[:shared]) if shared else None
        own = self.to_host(locations[shared:]) if shared < tokens else None
        return HostCopy(tokens, shared, prefix, own)

    def load(self, req: Req, copy: HostCopy, locations: torch.Tensor, shared: int) -> None:
        """Begin to write a request's KV to `locations`, as `to_device` does, without the first
        `shared` tokens, which are there."""
        if copy.prefix is not None and not shared:
            self.to_device(copy.prefix, locations[: copy.shared])
        if copy.own is not None:
            self.to_device(copy.own, locations[copy.shared :])

    def hold_steps(self, kv: HostKV) -> None:
        """Have steps launched from now on wait for the copy, if it is not complete by then."""
        if kv.done is not None:
            self._stream.hold_steps(kv.done)

    def free(self, kv: HostKV) -> None:
        """Give the host memory of a copy back, complete or not."""
        assert kv.start is not None
        self._pieces.give(kv.start, kv.tokens)


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CHUNK):
        yield slice(start, min(start + CHUNK, tokens))


def _all_buffers(scheduler: SchedulerProtocol) -> list[torch.Tensor] | None:
    if drafts.drafts(scheduler) and not drafts.carries(scheduler):
        return None
    pools = [scheduler.token_to_kv_pool_allocator.get_kvcache(), *drafts.draft_pools(scheduler)]
    found: list[torch.Tensor] = []
    for pool in pools:
        buffers = _buffers_of(pool)
        if buffers is None:
            return None
        found += buffers
    return found


def _buffers_of(pool: Any) -> list[torch.Tensor] | None:
    """The pool's buffers, each of shape (entries, ...); None for pools that hold more than that
    (scales, index keys), or where an entry is not a row of each. Exact types: what a subclass adds
    would be left behind."""
    if type(pool) is MHATokenToKVPool:
        plain = pool.kv_cache_layout == "nhd" and not pool.is_quantized_kv_cache
        return [*pool.k_buffer, *pool.v_buffer] if plain else None
    if type(pool) is MLATokenToKVPool:
        plain = pool._write_loc_dcp_span == 1 and pool.kv_scale_buffer is None
        return [buffer for buffer in pool.kv_buffer if buffer.shape[0]] if plain else None
    return None
