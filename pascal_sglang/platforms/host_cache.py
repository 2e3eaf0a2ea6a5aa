"""SGLang's hierarchical cache on a CPU: its host pool is memory like the device's.

For `--enable-hierarchical-cache --hicache-io-backend direct --hicache-mem-layout layer_first`.
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
