"""What differs between tensor-parallel ranks must not reach a decision."""

from __future__ import annotations

from typing import Any

import torch


def is_alone(scheduler: Any) -> bool:
    """Whether the instance has one rank, which agrees with itself."""
    size: int = scheduler.tp_cpu_group.size()
    return size == 1


def agree(scheduler: Any, *values: float) -> Any:
    """TP rank 0's value on every rank; a list if several are given."""
    group = scheduler.tp_cpu_group
    shared = list(values)
    if not is_alone(scheduler):
        tensor = torch.tensor(shared, dtype=torch.float64)
        torch.distributed.broadcast(
            tensor, src=torch.distributed.get_global_rank(group, 0), group=group
        )
        shared = tensor.tolist()
    return shared if len(values) > 1 else shared[0]
