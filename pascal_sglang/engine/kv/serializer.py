"""KV entries as plain bytes, for the pools whose layout we know: plain MHA and MLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from sglang.srt.runtime_context import get_parallel, get_serving

from pascal_sglang.engine.kv.host_copies import HostCopies, HostKV
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


class KVSerializer:
    """Reads and writes KV entries of one rank's pool.

    per_token: bytes of one entry.
    """

    def __init__(
        self,
        copies: HostCopies,
        buffers: Sequence[torch.Tensor],
        model: str,
        weights: Callable[[], str],
    ) -> None:
        """buffers: the pool's, whose first dimension is the KV entry. weights: the version of the
        model's weights, which may change."""
        self.copies, self._buffers = copies, buffers
        self.per_token: int = sum(b[0].nbytes for b in buffers)
        shapes = sorted({f"{b.dtype}{tuple(b.shape[1:])}" for b in buffers})
        ranks = get_parallel().attn_tp_size
        self._weights = weights
        self._layout = f"{len(buffers)}x{'+'.join(shapes)} tp{ranks} {model}"

    @property
    def layout(self) -> str:
        """A name for what the bytes mean now: equal names, equal bytes for equal tokens."""
        return f"{self._layout} weights {self._weights()}"[-1000:]

    def copy_out(self, locations: torch.Tensor, memory: memoryview) -> HostKV:
        """Begin to write the entries at `locations`, shape (tokens,), to `memory`; they are there
        when `copies.wait` returns."""
        return self.copies.read(locations, HostKV(list(self._blocks(memory, len(locations)))))

    def copy_host(self, halves: Sequence[HostKV], begin: int, end: int, memory: memoryview) -> None:
        """Write the entries `begin`..`end` of a complete copy in host memory, which stands in
        `halves` one after the other."""
        blocks, at = list(self._blocks(memory, end - begin)), 0
        for half in halves:
            first, last = max(begin - at, 0), min(end - at, half.tokens)
            if first < last:
                for part, block in zip(half.parts, blocks, strict=True):
                    block[at + first - begin : at + last - begin] = part[first:last]
            at += half.tokens

    def copy_in(self, locations: torch.Tensor, memory: memoryview) -> HostKV:
        """Begin the reverse of `copy_out`; `memory` is read until `copies.wait` returns."""
        kv = HostKV(list(self._blocks(memory, len(locations))))
        self.copies.to_device(kv, locations)
        return kv

    def _blocks(self, memory: memoryview, tokens: int) -> Iterator[torch.Tensor]:
        at = 0
        for buffer in self._buffers:
            shape = (tokens, *buffer.shape[1:])
            count = tokens * buffer[0].numel()
            yield torch.frombuffer(memory, dtype=buffer.dtype, count=count, offset=at).view(shape)
            at += count * buffer.element_size()


def kv_bytes_of(scheduler: SchedulerProtocol, copies: HostCopies) -> KVSerializer | str:
    """Access to the scheduler's pool, or why its KV cannot travel."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if copies.buffers is None:
        return f"KV in a {type(pool).__name__} of this layout does not travel yet"
    if copies.states is not None:
        return "recurrent states do not travel yet"
    if copies.windows is not None:
        return "entries of sliding windows do not travel yet"
    if scheduler.server_args.enable_hierarchical_cache:
        return "a prefix in the host pool of the hierarchical cache does not travel yet"
    model = str(scheduler.server_args.model_path)
    return KVSerializer(copies, copies.buffers, model, lambda: str(get_serving().weight_version))
