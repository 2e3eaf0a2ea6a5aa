"""Contiguous pieces of one stretch of memory, counted in KV entries."""

from __future__ import annotations

from bisect import bisect_left


class RangeAllocator:
    """Gives out pieces of `size` entries and takes them back.

    Best fit: the smallest hole that is large enough, and of equals the first, so that ranks that
    ask alike are given alike.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []  # (start, end), in order

    @property
    def largest(self) -> int:
        """The largest piece to be had now."""
        return max((end - start for start, end in self._holes), default=0)

    def take(self, count: int) -> int | None:
        """The start of a piece of `count` entries; None if no hole is large enough."""
        fits = [(end - start, start, i) for i, (start, end) in enumerate(self._holes)]
        found = min((hole for hole in fits if hole[0] >= count), default=None)
        if found is None:
            return None
        room, start, i = found
        self._holes[i : i + 1] = [(start + count, start + room)] if room > count else []
        return start

    def give(self, start: int, count: int) -> None:
        """Take a piece back; the holes beside it become one with it."""
        i = bisect_left(self._holes, (start, start))
        first, last, end = i, i, start + count
        if i and self._holes[i - 1][1] == start:
            first, start = i - 1, self._holes[i - 1][0]
        if i < len(self._holes) and self._holes[i][0] == end:
            last, end = i + 1, self._holes[i][1]
        self._holes[first:last] = [(start, end)]
