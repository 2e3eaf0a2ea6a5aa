"""Which request lives on which instance, as far as the controller sent it there or moved it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

CAPACITY = 1 << 20


class Residents:
    """Bounded: beyond `CAPACITY` live requests the oldest are forgotten."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._homes: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def lives(self, rid: str, index: int) -> None:
        """The request is on that instance now."""
        self._homes[rid] = index
        while len(self._homes) > self.capacity:
            self._homes.popitem(last=False)

    def home(self, rid: str) -> int | None:
        return self._homes.get(rid)

    def gone(self, rid: str) -> None:
        """The request has ended."""
        self._homes.pop(rid, None)

    def __iter__(self) -> Iterator[str]:
        """Every request, beginning with the one not asked about for the longest time."""
        return iter(self._homes)

    def asked_about(self, rid: str) -> None:
        """The request is the last one to be asked about again (`cluster.location_check`)."""
        self._homes.move_to_end(rid)

    def of(self, index: int) -> list[str]:
        """All requests on an instance."""
        return [rid for rid, home in self._homes.items() if home == index]
