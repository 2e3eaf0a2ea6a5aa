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


def all_agree(scheduler: Any, holds: bool) -> bool:
    """Whether something holds on every TP rank."""
    group = scheduler.tp_cpu_group
    if is_alone(scheduler):
        return holds
    tensor = torch.tensor([float(holds)])
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(tensor.item())


def from_every_rank(scheduler: Any, value: str) -> list[str]:
    """Every TP rank's value, in the order of ranks."""
    group = scheduler.tp_cpu_group
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [value]
    found: list[str] = [""] * size
    torch.distributed.all_gather_object(found, value, group=group)
    return found
