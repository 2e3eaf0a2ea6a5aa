"""KV between the device pool and host memory: beside the decoding on CUDA, at once elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool


@dataclass(slots=True)
class HostKV:
    """KV of some tokens in host memory, in the pool's own format.

    parts: one tensor per buffer of the pool, shape (tokens, ...), or whatever the pool itself made.
    done: the event after which they are complete; None if they are.
    """

    parts: Any
    done: Any = None


class Copies:
    """Copies KV entries of one device pool.

    On CUDA a copy runs on a stream of its own, layer by layer, into pinned memory, while the next
    step decodes: `deferred` says that whoever asked for it must `wait` before the entries are
    freed. Every rank waits in the same pass, whatever its event says, so that ranks go on alike.
    Pools other than plain MHA and MLA are copied by their own blocking functions.

    buffers: the pool's, each of shape (entries, ...); None for those other pools.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.buffers = _buffers_of(scheduler.token_to_kv_pool_allocator.get_kvcache())
        on_cuda = str(scheduler.device).startswith("cuda")
        self._stream = torch.cuda.Stream() if on_cuda and self.buffers else None
        self.deferred = self._stream is not None

    def to_host(self, locations: torch.Tensor) -> HostKV:
        """Begin to copy the entries at `locations`, shape (tokens,), which no step in flight
        writes. Raises: RuntimeError, MemoryError if host memory or the device fails."""
        if self.buffers is None:
            return HostKV(self._scheduler.token_to_kv_pool_allocator.get_cpu_copy(locations))
        if self._stream is None:
            return HostKV([buffer[locations] for buffer in self.buffers])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            parts = []
            for buffer in self.buffers:
                rows = buffer[locations]
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                parts.append(host.copy_(rows, non_blocking=True))
            done = torch.cuda.Event()
            done.record()
        locations.record_stream(self._stream)
        return HostKV(parts, done)

    def wait(self, kv: HostKV) -> None:
        """Until the copy is complete; a device that fails raises RuntimeError."""
        if kv.done is not None:
            kv.done.synchronize()
            kv.done = None

    def to_device(self, kv: HostKV, locations: torch.Tensor) -> None:
        """Write the entries to `locations`; steps launched from now on see them."""
        if self.buffers is None:
            self._scheduler.token_to_kv_pool_allocator.load_cpu_copy(kv.parts, locations)
            return
        if self._stream is None:
            for buffer, part in zip(self.buffers, kv.parts, strict=True):
                buffer[locations] = part
            return
        # A step in flight may still write entries that have just been freed and given to us.
        steps = {torch.cuda.current_stream(), self._scheduler.forward_stream}
        for stream in steps:
            self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            for buffer, part in zip(self.buffers, kv.parts, strict=True):
                buffer[locations] = part.to(buffer.device, non_blocking=True)
        locations.record_stream(self._stream)
        for stream in steps:
            stream.wait_stream(self._stream)


def _buffers_of(pool: Any) -> list[torch.Tensor] | None:
    """The pool's buffers, each of shape (entries, ...); None for pools that hold more than that, or
    where an entry is not a row of each."""
    if type(pool) is MHATokenToKVPool and not pool.use_hnd:
        return [*pool.k_buffer, *pool.v_buffer]
    if type(pool) is MLATokenToKVPool and pool._write_loc_dcp_span == 1:
        return [buffer for buffer in pool.kv_buffer if buffer.shape[0]]
    return None
