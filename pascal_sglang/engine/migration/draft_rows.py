"""What a draft model keeps of a request, as bytes that travel to another instance."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import torch

from pascal_sglang.cluster.messages import Count
from pascal_sglang.engine.kv.drafts import DraftState, carries, traveling_rows
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


class DraftRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor, of shape (1, *shape)."""

    dtype: str
    shape: Annotated[list[Count], msgspec.Meta(max_length=2)]
    content: bytes


def pack(state: DraftState | None) -> dict[str, DraftRow]:
    """The rows of a request; none without a draft model."""
    return {
        name: DraftRow(
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape[1:]),
            tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in (state or {}).items()
    }


def unpack(rows: dict[str, DraftRow], scheduler: SchedulerProtocol) -> DraftState | None:
    """The state for this instance's draft model; None without one. Raises: ValueError for rows that
    are not such a state."""
    if not carries(scheduler):
        if rows:
            raise ValueError("rows of a draft model, which is not here")
        return None
    expected = traveling_rows(scheduler)
    if rows.keys() != expected.keys():
        raise ValueError("other rows than the draft model has")
    state: DraftState = {}
    for name, row in rows.items():
        shape, dtypes = expected[name]
        found = next((d for d in dtypes if str(d) == f"torch.{row.dtype}"), None)
        size = 0 if found is None else found.itemsize * math.prod(shape)
        if found is None or tuple(row.shape) != shape or len(row.content) != size:
            raise ValueError(f"{name} of another form")
        tensor = torch.frombuffer(bytearray(row.content), dtype=found).view(1, *shape)
        if not found.is_floating_point:
            least, most = int(tensor.min()), int(tensor.max())
            if least < 0 or most >= scheduler.model_config.vocab_size:
                raise ValueError(f"{name} that is no token")
        state[name] = tensor.to(scheduler.device)
    return state
