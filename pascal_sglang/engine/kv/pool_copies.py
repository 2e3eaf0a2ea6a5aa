"""KV in host memory by SGLang's own copies, for pools that we do not know byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    MHATokenToKVPool,
    MHATokenToKVPoolMXFP8,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from pascal_sglang.engine.kv.host_cache import HeldPrefix
from pascal_sglang.engine.kv.host_copies import HostCopies, HostCopy
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.recurrent_states import recurrent_states_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


@dataclass(slots=True)
class PoolKV(HostKV):
    """What a pool gave for some tokens; its form is the pool's own, and `parts` is empty."""

    count: int = 0
    content: Any = None

    @property
    def tokens(self) -> int:
        return self.count


class PoolCopies(HostCopies):
    """Host memory for paused KV as the pool's `get_cpu_copy` gives it and `load_cpu_copy` takes it.

    A copy is complete when it is begun: the pool waits for the device, and the memory is neither
    pinned nor taken at the start. A shared prefix is not told apart in a copy.
    Recurrent states that we do not know are not copied.
    """

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        super().__init__(scheduler)
        self.buffers = self.states = self.windows = None
        self.deferred = False
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.by_row = bool(getattr(pool, "kpool_use_compress", False))
        self._free_tokens = 0
        self._bytes_per_token = self._measure()

    def _measure(self) -> int:
        """Bytes in host memory of one token's KV; 0 where the pool copies nothing."""
        pool = self._scheduler.token_to_kv_pool_allocator.get_kvcache()
        if recurrent_states_of(self._scheduler) is not None or not _copies_all(pool):
            return 0
        probe = torch.ones(1, dtype=torch.int64, device=self._scheduler.device)
        try:
            content = self._scheduler.token_to_kv_pool_allocator.get_cpu_copy(probe)
        except (AssertionError, RuntimeError):
            return 0
        return sum(tensor.nbytes for tensor in _tensors(content))

    @property
    def copies(self) -> bool:
        return self._bytes_per_token > 0

    @property
    def bytes_per_token(self) -> int:
        return self._bytes_per_token or super().bytes_per_token

    @property
    def room(self) -> int:
        return self._free_tokens

    def reserve(self, entries: int) -> None:
        self._free_tokens = self.capacity = entries

    def to_host(self, locations: torch.Tensor, req: Req | None = None) -> PoolKV:
        """Copy the entries at `locations`, and what the pool has by the row of `req`."""
        kv = PoolKV([], count=len(locations))
        if kv.count > self._free_tokens:
            raise RuntimeError(f"no host memory for {kv.count} KV entries")
        self._free_tokens -= kv.count
        try:
            allocator = self._scheduler.token_to_kv_pool_allocator
            kv.content = allocator.get_cpu_copy(locations, req_pool_index=_row(req))
        except RuntimeError:
            self._failed(kv)
        return kv

    def to_device(self, kv: HostKV, locations: torch.Tensor, req: Req | None = None) -> None:
        assert isinstance(kv, PoolKV)
        try:
            # A step in flight may still write entries that have just been freed and given to us.
            if self._scheduler.device != "cpu":
                torch.get_device_module(locations.device).synchronize()
            allocator = self._scheduler.token_to_kv_pool_allocator
            allocator.load_cpu_copy(kv.content, locations, req_pool_index=_row(req))
        except RuntimeError:
            self._failed(kv)

    def save(self, req: Req, locations: torch.Tensor, held: HeldPrefix | None = None) -> HostCopy:
        tokens = len(locations)
        shared = 0 if held is None else min(req.kv.cache_protected_len, tokens)
        own = self.to_host(locations[shared:], req) if shared < tokens else None
        copy = HostCopy(tokens, shared, None, own, held)
        if self._window_pool is not None:
            copy.before = self._window_pool.before(tokens)
        return copy

    def load(self, req: Req, copy: HostCopy, locations: torch.Tensor, shared: int) -> None:
        if copy.own is not None:
            self.to_device(copy.own, locations[copy.shared :], req)

    def free(self, kv: HostKV) -> None:
        self._free_tokens += kv.tokens


def _copies_all(pool: Any) -> bool:
    """Whether the pool's own copies leave nothing of it behind. Those of FP4 pools, and of others
    with scales, leave the scales."""
    if type(pool) is SWAKVPool:
        return _copies_all(pool.full_kv_pool) and _copies_all(pool.swa_kv_pool)
    if type(pool) is MHATokenToKVPool:
        return not pool.is_quantized_kv_cache
    if type(pool) in (MLATokenToKVPool, DSATokenToKVPool):
        return pool.kv_scale_buffer is None
    return type(pool) is MHATokenToKVPoolMXFP8


def _row(req: Req | None) -> int | None:
    return None if req is None else req.kv.req_pool_idx


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        yield from _tensors(content.values())
    elif isinstance(content, Iterable):
        for one in content:
            yield from _tensors(one)
