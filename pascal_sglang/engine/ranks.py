"""What differs between tensor-parallel ranks must not reach a decision.

Ranks meet: every rank says something, and all hear the same. Whoever meets says along where it is
and what of ours has failed on it so far, so that a rank that failed alone is seen at the next
meeting, which ends the instance: its ranks hold different requests by then, and would wait for one
another in the next step for ever.
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


class RanksDiverged(Exception):
    """The TP ranks of this instance no longer do the same. Nothing but its end is left."""


@dataclass(slots=True)
class Course:
    """What a rank has done: how often it met the others, and a checksum of what failed on it."""

    meetings: int = 0
    failures: int = 0
    last: str = ""


def is_alone(scheduler: Any) -> bool:
    """Whether the instance has one rank, which agrees with itself."""
    size: int = scheduler.tp_cpu_group.size()
    return size == 1


def agree(scheduler: Any, *values: float) -> Any:
    """TP rank 0's value on every rank; a list if several are given. Raises: RanksDiverged."""
    if is_alone(scheduler):
        return list(values) if len(values) > 1 else values[0]
    leads = torch.distributed.get_rank(scheduler.tp_cpu_group) == 0
    shared = [_meet(scheduler, "value", value if leads else math.inf) for value in values]
    return shared if len(values) > 1 else shared[0]


def all_agree(scheduler: Any, holds: bool) -> bool:
    """Whether something holds on every TP rank. Raises: RanksDiverged."""
    return holds if is_alone(scheduler) else bool(_meet(scheduler, "holds", float(holds)))


def attempt(scheduler: Any, work: Callable[[], None]) -> Exception | None:
    """Do something of ours; the error if it fails, which is then the same on all TP ranks. Raises:
    RanksDiverged if it is not."""
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
    _meet(scheduler, "attempt", 0.0)
    return failed


def _note(scheduler: Any, error: Exception) -> None:
    """This rank has failed, and where. Not what the text says, which may name a device."""
    course = _course(scheduler)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames]
    free = scheduler.token_to_kv_pool_allocator.available_size()
    where = f"{course.meetings} {type(error).__name__} {places} {free}"
    course.failures = zlib.crc32(where.encode(), course.failures)
    course.last = f"{type(error).__name__}: {error}"


def _course(scheduler: Any) -> Course:
    course: Course | None = getattr(scheduler, "pascal_course", None)
    if course is None:
        course = scheduler.pascal_course = Course()
    return course


def _meet(scheduler: Any, what: str, value: float) -> float:
    """The least `value` of all ranks. One kind of collective for everything, so that ranks that are
    at different places meet all the same."""
    course = _course(scheduler)
    course.meetings += 1
    mark = zlib.crc32(f"{course.meetings} {what}".encode(), course.failures)
    tensor = torch.tensor([value, mark, -mark], dtype=torch.float64)
    op = torch.distributed.ReduceOp.MIN
    torch.distributed.all_reduce(tensor, op=op, group=scheduler.tp_cpu_group)
    least, first, last = tensor.tolist()
    if first != -last:
        here = f"here: {course.last}" if course.last else "not here"
        raise RanksDiverged(
            f"pascal_sglang: a TP rank failed alone ({here}); the ranks of this instance no longer "
            "do the same, and it ends"
        )
    return float(least)


def from_every_rank(scheduler: Any, value: str) -> list[str]:
    """Every TP rank's value, in the order of ranks."""
    group = scheduler.tp_cpu_group
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [value]
    found: list[str] = [""] * size
    torch.distributed.all_gather_object(found, value, group=group)
    return found
