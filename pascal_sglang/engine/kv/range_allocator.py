"""Ranges of one stretch of memory, counted in KV entries."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

# Begin and end.
Range = tuple[int, int]


class RangeAllocator:
    """Gives out `size` entries and takes them back.

    Best fit: the smallest hole that is large enough, and of equals the first. Where none is, the
    largest ones: nothing is refused because what is free lies scattered. Ranks that ask alike are
    given alike.
    """

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._holes: list[Range] = [(0, size)] if size else []  # In order.

    def take(self, count: int) -> list[Range] | None:
        """Ranges of `count` entries together; None if so many are not free."""
        if count > self.free:
            return None
        self.free -= count
        fits = [hole for hole in self._holes if hole[1] - hole[0] >= count]
        if fits:
            return [self._cut(min(fits, key=_length), count)]
        taken: list[Range] = []
        while count:
            largest = max(self._holes, key=_length)
            taken.append(self._cut(largest, min(count, _length(largest))))
            count -= _length(taken[-1])
        return taken

    def _cut(self, hole: Range, count: int) -> Range:
        """The first `count` entries of a hole."""
        i = bisect_left(self._holes, hole)
        begin, end = hole
        self._holes[i : i + 1] = [(begin + count, end)] if end - begin > count else []
        return begin, begin + count

    def give(self, ranges: Iterable[Range]) -> None:
        """Take ranges back; the holes beside one become one with it."""
        for begin, end in ranges:
            self.free += end - begin
            i = bisect_left(self._holes, (begin, begin))
            first, last = i, i
            if i and self._holes[i - 1][1] == begin:
                first, begin = i - 1, self._holes[i - 1][0]
            if i < len(self._holes) and self._holes[i][0] == end:
                last, end = i + 1, self._holes[i][1]
            self._holes[first:last] = [(begin, end)]


def _length(hole: Range) -> int:
    return hole[1] - hole[0]
