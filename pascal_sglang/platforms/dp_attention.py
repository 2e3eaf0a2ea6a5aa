"""What DP attention gathers and scatters, in plain PyTorch over gloo."""

from __future__ import annotations

from typing import Any

import torch


def all_gather_into_tensor(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """`GroupCoordinator.all_gather_into_tensor`: the inputs of all ranks, one after the other."""
    parts = list(output.view(group.world_size, *input.shape).unbind())
    torch.distributed.all_gather(parts, input.contiguous(), group=group.device_group)


def reduce_scatter_tensor(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """`GroupCoordinator.reduce_scatter_tensor`: this rank's part of the sum of all inputs."""
    whole = input.clone()
    torch.distributed.all_reduce(whole, group=group.device_group)
    output.copy_(whole.view(group.world_size, *output.shape)[group.rank_in_group])


def rotate_any(rotate: Any) -> Any:
    """Around `RotaryEmbedding.forward_native`, which takes no batch without tokens: a rank of DP
    attention that has no request steps along with the others."""

    def forward_native(
        self: Any,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not positions.numel():
            return query, key
        rotated: tuple[torch.Tensor, torch.Tensor] = rotate(
            self, positions, query, key, *args, **kwargs
        )
        return rotated

    return forward_native


def install() -> None:
    """Put these in the place of what needs a GPU. Called as SGLang's model runner is imported."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.model_executor import forward_batch_info

    GroupCoordinator.all_gather_into_tensor = all_gather_into_tensor
    GroupCoordinator.reduce_scatter_tensor = reduce_scatter_tensor
    RotaryEmbedding.forward_native = rotate_any(RotaryEmbedding.forward_native)
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    # Counts of tokens are made in pinned memory otherwise.
    forward_batch_info._is_cpu = True
