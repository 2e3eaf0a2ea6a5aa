"""Entries of a pool in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pascal_sglang.engine.kv.range_allocator import Range


@dataclass(slots=True)
class HostKV:
    """Entries of a pool (KV of some tokens, or one state) in host memory, in the pool's own format.

    parts: memory per buffer of the pool, shape (places, ...). done: the event after which they are
    complete; None if they are. ranges: the places of the entries, in order, where they are in the
    memory of `EntryCopies`; None elsewhere, where they are all there is. failed: the device did not
    copy them. pinned: the device reads and writes the memory by itself.
    """

    parts: list[torch.Tensor]
    done: Any = None
    ranges: list[Range] | None = None
    failed: bool = False
    pinned: bool = False

    @property
    def tokens(self) -> int:
        return sum(end - begin for begin, end in self.places)

    @property
    def places(self) -> list[Range]:
        """Where the entries are in `parts`, in order."""
        return [(0, len(self.parts[0]))] if self.ranges is None else self.ranges

    def between(self, begin: int, end: int) -> HostKV:
        """Those from number `begin` to `end`, at the same places."""
        ranges: list[Range] = []
        at = 0
        for first, last in self.places:
            low, high = max(begin - at, 0), min(end - at, last - first)
            if low < high:
                ranges.append((first + low, first + high))
            at += last - first
        return HostKV(self.parts, ranges=ranges, pinned=self.pinned)

    def runs(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Entries at neighbouring places, up to `most` at a time: the number of the first, and the
        first place and the one after the last."""
        at = 0
        for begin, end in self.places:
            for first in range(begin, end, most):
                last = min(first + most, end)
                yield at, first, last
                at += last - first


def joined(many: Sequence[HostKV]) -> HostKV:
    """The entries of several with the same `parts`, one after the other, as one."""
    ranges: list[Range] = []
    for begin, end in (place for kv in many for place in kv.places):
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return HostKV(many[0].parts, ranges=ranges, pinned=many[0].pinned)
