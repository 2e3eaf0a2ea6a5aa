"""Agreement among the tensor-parallel ranks of an instance.

What differs between ranks must not reach a decision. Every agreement is the same small collective,
and carries a checksum of how many a rank has taken part in and of the failures of ours on it. The
next agreement, in the same pass, notices a rank that failed alone, and the instance ends: its ranks
hold different requests by then, and the next step would wait for ever.
"""

from __future__ import annotations

import math
import os
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol

# Errors of one kind that a process writes to its log; the rest are counted.
ERRORS_LOGGED = 5
# Values of one agreement at most. Each is as long as this, so that ranks that agree on different
# things still meet, and notice.
VALUES = 8


class RanksDiverged(Exception):
    """The TP ranks of this instance no longer do the same; the instance has to end."""


@dataclass(slots=True)
class RankState:
    """What an agreement compares, for one rank."""

    # Agreements that the rank has taken part in.
    agreements: int = 0
    # A checksum of the failures of ours on the rank: where, after how many agreements.
    failures: int = 0
    # The failure since the last agreement, for the error text.
    failed: str = ""


def is_alone(scheduler: SchedulerProtocol) -> bool:
    """Whether the instance has one rank, which agrees with itself."""
    size: int = scheduler.attn_tp_cpu_group.size()
    return size == 1


def agree(scheduler: SchedulerProtocol, *values: float) -> Any:
    """TP rank 0's value on every rank; a list if several are given. Raises: RanksDiverged."""
    shared = least(scheduler, *(own_word(scheduler, value) for value in values))
    return shared if len(values) > 1 else shared[0]


def own_word(scheduler: SchedulerProtocol, value: float) -> float:
    """What a rank gives to `least` where TP rank 0's value is to be had."""
    if is_alone(scheduler):
        return value
    leads = torch.distributed.get_rank(scheduler.attn_tp_cpu_group) == 0
    return value if leads else math.inf


def least(scheduler: SchedulerProtocol, *values: float) -> list[float]:
    """The least of each value that any TP rank gives, by one collective for up to `VALUES`.
    Raises: RanksDiverged."""
    if is_alone(scheduler):
        return list(values)
    parts = [values[at : at + VALUES] for at in range(0, len(values), VALUES)]
    return [found for part in parts for found in _least(scheduler, "values", *part)]


def all_agree(scheduler: SchedulerProtocol, holds: bool) -> bool:
    """Whether something holds on every TP rank. Raises: RanksDiverged."""
    return holds if is_alone(scheduler) else bool(_least(scheduler, "holds", float(holds))[0])


def catch_on_all_ranks(scheduler: SchedulerProtocol, work: Callable[[], None]) -> Exception | None:
    """Do some work of ours, and return its error if it failed. The error is the same on all ranks
    then. Raises: RanksDiverged if it is not."""
    failed: Exception | None = None
    try:
        work()
    except RanksDiverged:
        raise
    except Exception as error:
        failed = error
    if is_alone(scheduler):
        return failed
    if failed is not None:
        _note(scheduler, failed)
    try:
        _least(scheduler, "outcome")
    except RanksDiverged as diverged:
        raise diverged from failed
    return failed


def _note(scheduler: SchedulerProtocol, error: Exception) -> None:
    """Remember a failure on this rank by its place: the text may name a device."""
    state = _state_of(scheduler)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames]
    free = scheduler.token_to_kv_pool_allocator.available_size()
    where = f"{state.agreements} {type(error).__name__} {places} {free}"
    state.failures = zlib.crc32(where.encode(), state.failures)
    state.failed = f"{type(error).__name__}: {error}"


def _state_of(scheduler: SchedulerProtocol) -> RankState:
    state: RankState | None = getattr(scheduler, "pascal_rank_state", None)
    if state is None:
        state = scheduler.pascal_rank_state = RankState()
    return state


def _least(scheduler: SchedulerProtocol, what: str, *values: float) -> list[float]:
    """The least of all ranks, of each value. One collective for everything that ranks agree on, so
    that ranks at different places of a pass take part in the same one, and notice."""
    state = _state_of(scheduler)
    state.agreements += 1
    kind = f"{state.agreements} {what} {len(values)}"
    checksum = zlib.crc32(kind.encode(), state.failures)
    given = [*values, *[math.inf] * (VALUES - len(values))]
    tensor = torch.tensor([*given, checksum, -checksum], dtype=torch.float64)
    op = torch.distributed.ReduceOp.MIN
    torch.distributed.all_reduce(tensor, op=op, group=scheduler.attn_tp_cpu_group)
    everything: list[float] = tensor.tolist()
    *found, low, high = everything
    if low != -high:
        here = f"here: {state.failed}" if state.failed else "not here"
        raise RanksDiverged(
            f"pascal_sglang: a TP rank failed alone ({here}); the ranks of this instance no longer "
            "do the same, and it ends"
        )
    state.failed = ""
    return found[: len(values)]


def from_every_rank(scheduler: SchedulerProtocol, value: str) -> list[str]:
    """Every TP rank's value, in the order of ranks."""
    group = scheduler.attn_tp_cpu_group
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [value]
    found: list[str] = [""] * size
    torch.distributed.all_gather_object(found, value, group=group)
    return found
