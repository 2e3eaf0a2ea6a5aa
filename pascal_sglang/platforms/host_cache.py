"""SGLang's hierarchical cache on a CPU: its host pool is memory like the device's.

For `--enable-hierarchical-cache --hicache-io-backend direct`, with `--hicache-mem-layout`
`layer_first` or `page_first_direct`. In the latter, buffers of the host pool have the shape (pages,
layers, entries of a page, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy entries by index, buffer by buffer."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices.long()] = source[src_indices.long()]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy one layer of entries from buffers of the host pool, page by page, to the device's."""
    page, entry = src_indices.long() // page_size, src_indices.long() % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices.long()] = source[page, layer_id, entry]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy all layers of entries to buffers of the host pool; `src_ptrs` has the layers of the
    first one, then those of the next."""
    page, entry = dst_indices.long() // page_size, dst_indices.long() % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, source in enumerate(src_ptrs):
        dst_ptrs[i // layers][page, i % layers, entry] = source[src_indices.long()]


def _cuda_host_register(
    buffer: torch.Tensor, registration_granularity_bytes: int | None = None
) -> None:
    """No other device copies from here."""


def install() -> None:
    """Put the functions above in the place of SGLang's for CUDA."""
    from sglang.srt.mem_cache.pool_host import base, common, mamba, mha, mla

    # SGLang leaves 10 GiB of the host's memory alone, which is more than a laptop has free.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    common._cuda_host_register = _cuda_host_register
    for module in (mamba, mha, mla):
        module.transfer_kv_direct = transfer_kv_direct
        module.transfer_kv_per_layer_direct_pf_lf = transfer_kv_per_layer_direct_pf_lf
        module.transfer_kv_all_layer_direct_lf_pf = transfer_kv_all_layer_direct_lf_pf
