"""KV entries as plain bytes, for the pools whose layout we know: plain MHA and MLA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.runtime_context import get_parallel


class KvBytes:
    """Reads and writes KV entries of one rank's pool.

    buffers: tensors whose first dimension is the KV entry; their order is the order of the bytes.
    per_token: bytes of one entry. layout: a name for all of it; equal names mean equal bytes.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], model: str) -> None:
        self.buffers = list(buffers)
        self.per_token = sum(b[0].nbytes for b in self.buffers)
        shapes = sorted({f"{b.dtype}{tuple(b.shape[1:])}" for b in self.buffers})
        ranks = get_parallel().tp_size
        self.layout = f"{len(self.buffers)}x{'+'.join(shapes)} tp{ranks} {model}"[-1000:]

    def copy_out(self, locations: torch.Tensor, memory: memoryview) -> None:
        """Write the entries at `locations`, shape (tokens,), to `memory`."""
        for buffer, block in zip(self.buffers, self._blocks(memory, len(locations)), strict=True):
            block.copy_(buffer[locations])

    def copy_host(self, blocks: Iterable[torch.Tensor], memory: memoryview) -> None:
        """The same from host tensors, one per buffer, each of as many entries as `memory` takes."""
        blocks = list(blocks)
        for source, block in zip(blocks, self._blocks(memory, len(blocks[0])), strict=True):
            block.copy_(source)

    def copy_in(self, locations: torch.Tensor, memory: memoryview) -> None:
        """The reverse of `copy_out`."""
        for buffer, block in zip(self.buffers, self._blocks(memory, len(locations)), strict=True):
            buffer[locations] = block.to(buffer.device)

    def _blocks(self, memory: memoryview, tokens: int) -> Iterable[torch.Tensor]:
        at = 0
        for buffer in self.buffers:
            shape = (tokens, *buffer.shape[1:])
            count = tokens * buffer[0].numel()
            yield torch.frombuffer(memory, dtype=buffer.dtype, count=count, offset=at).view(shape)
            at += count * buffer.element_size()


def host_blocks(copy: Any) -> list[torch.Tensor]:
    """What the pool's `get_cpu_copy` returned, as one tensor per buffer in the order of
    `KvBytes.buffers`: a list per layer, of pieces, each a tensor or a pair of them."""
    blocks: list[torch.Tensor] = []
    for layer in copy:
        pieces = [piece if isinstance(piece, list | tuple) else [piece] for piece in layer]
        blocks += [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    return blocks


def kv_bytes_of(scheduler: Any) -> KvBytes | str:
    """Access to the scheduler's pool, or why its KV cannot travel."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    model = str(scheduler.server_args.model_path)
    # Exact types: a subclass has a layout of its own.
    if type(pool) is MHATokenToKVPool:
        if pool.use_hnd or pool.kv_cache_layout != "nhd" or pool.k_scale_buffer is not None:
            return "the KV pool's layout is not the plain one"
        pairs = zip(pool.k_buffer, pool.v_buffer, strict=True)
        return KvBytes([buffer for pair in pairs for buffer in pair], model)
    if type(pool) is MLATokenToKVPool:
        if pool.use_dsa or pool.dcp_replicated or pool.kv_scale_buffer is not None:
            return "the KV pool's layout is not the plain one"
        return KvBytes(pool.kv_buffer, model)
    return f"KV in a {type(pool).__name__} does not travel yet"
