"""Who waits or is paused, best first, without sorting everybody in every pass."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from pascal_sglang.policy.ranking import Moment, Order, Tuning
from pascal_sglang.policy.request import Member, Place

Entry = tuple[float, int, int, Member]


class Line:
    """Members that do not run, in lanes whose inner order does not change while they wait.

    Adding and removing cost O(log n); walking the first k costs O(k log n) and a comparison per
    lane. A removed member's entry stays behind with an outdated ticket until it surfaces. A
    member's place must not change while it is in line.

    counts: members by (lane, place), without internal ones.
    """

    def __init__(self, order: Order, tuning: Tuning) -> None:
        self.order = order
        self.tuning = tuning
        self._lanes: dict[int, list[Entry]] = {}
        self.counts: Counter[tuple[int, Place]] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, member: Member) -> None:
        """Put a member in line, or again after what orders it has changed."""
        self.remove(member)
        member.ticket += 1
        key = self.order.key(member, self.tuning)
        member.lane = self.order.lane(member, self.tuning)
        lane = self._lanes.setdefault(member.lane, [])
        heapq.heappush(lane, (key, member.seq, member.ticket, member))
        self.counts[member.lane, member.place] += not member.internal
        self._size += 1

    def remove(self, member: Member) -> None:
        """Take a member out; nothing happens if it is not in line."""
        if self.holds(member):
            member.ticket += 1
            self.counts[member.lane, member.place] -= not member.internal
            self._size -= 1

    def clear(self) -> None:
        for lane in self._lanes.values():
            for _, _, _, member in lane:
                self.remove(member)
        self._lanes.clear()

    def holds(self, member: Member) -> bool:
        return member.ticket % 2 == 1

    def lengths(self) -> dict[tuple[str, str], int]:
        """Members by (name of the class, place). A paused answer counts as `answer` whether or not
        its reader is about to run dry."""
        return {
            (self.order.names[lane], place.value): count
            for (lane, place), count in self.counts.items()
        }

    def best_first(self, moment: Moment) -> Iterator[Member]:
        """The members in line by `(rank, key, seq)`; the line stays as it is."""
        taken: list[tuple[list[Entry], Entry]] = []
        try:
            while True:
                heads = [lane for lane in self._lanes.values() if self._surface(lane)]
                if not heads:
                    return
                lane = min(heads, key=lambda lane: self._place(lane[0], moment))
                entry = heapq.heappop(lane)
                taken.append((lane, entry))
                yield entry[3]
        finally:
            for lane, entry in taken:
                heapq.heappush(lane, entry)

    def _place(self, entry: Entry, moment: Moment) -> tuple[tuple[int, int], float, int]:
        return self.order.rank(entry[3], moment, self.tuning), entry[0], entry[1]

    @staticmethod
    def _surface(lane: list[Entry]) -> bool:
        """Drop outdated entries from the top; whether a true one is left."""
        with suppress(IndexError):
            while lane[0][2] != lane[0][3].ticket:
                heapq.heappop(lane)
            return True
        return False
