"""The order of a moved request's tokens, where the pipes of all instances end in one.

A pipe keeps its own order; two pipes have none. Every row of an output says which tokens of its
request it carries, so whether another instance's last ones are still missing can be seen: then the
message waits, and whatever else its instance sends waits behind it. No cycle is possible: what is
waited for was always sent before what waits.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

M = TypeVar("M")
CAPACITY = 1 << 16
# Longer than any pipe takes; beyond it the sender has died with tokens that nobody will see.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens `begin`..`end` of a request; `last`: it has none after them."""

    rid: str
    begin: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Waiting(Generic[M]):
    message: M
    rows: Sequence[Row]
    since: float


class OutputOrder(Generic[M]):
    """Lets messages pass in an order in which no request's tokens overtake earlier ones.

    held: how many messages had to wait. broken: rows that passed although something is missing.
    Of `CAPACITY` requests it is known how far they are; beyond that, the one that has been silent
    for the longest time is forgotten: an end that no row told, of an abort or a death.
    """

    def __init__(self) -> None:
        self.held = 0
        self.broken = 0
        self._passed: OrderedDict[str, int] = OrderedDict()
        self._waiting: dict[int, deque[Waiting[M]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def admit(self, instance: int, message: M, rows: Sequence[Row], now: float) -> list[M]:
        """`message` came from an instance; what may pass now, in order. now: seconds."""
        if instance in self._waiting or self._gap(rows):
            self.held += 1
            self._waiting.setdefault(instance, deque()).append(Waiting(message, rows, now))
            return []
        self._pass(rows)
        return [message, *self._release()] if self._waiting else [message]

    def overdue(self, now: float) -> list[tuple[M, list[int]]]:
        """Messages that waited too long, each with the indices of its rows before which something
        is missing: their requests cannot go on."""
        found: list[tuple[M, list[int]]] = []
        for instance in list(self._waiting):
            queue = self._waiting[instance]
            while queue and now - queue[0].since > PATIENCE_S:
                waiting = queue.popleft()
                gaps = [i for i, row in enumerate(waiting.rows) if self._gap([row])]
                self.broken += len(gaps)
                self._pass(waiting.rows)
                found.append((waiting.message, gaps))
            if not queue:
                del self._waiting[instance]
        found += [(message, []) for message in self._release()]
        return found

    def _gap(self, rows: Sequence[Row]) -> bool:
        return any(row.begin > self._passed.get(row.rid, 0) for row in rows)

    def _pass(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.last:
                self._passed.pop(row.rid, None)
                continue
            # A name that comes again begins anew; a row without tokens says nothing.
            anew = row.begin == 0 < row.end
            self._passed[row.rid] = row.end if anew else max(row.end, self._passed.get(row.rid, 0))
            self._passed.move_to_end(row.rid)
        while len(self._passed) > CAPACITY:
            self._passed.popitem(last=False)

    def _release(self) -> list[M]:
        found: list[M] = []
        progress = True
        while progress:
            progress = False
            for instance in list(self._waiting):
                queue = self._waiting[instance]
                while queue and not self._gap(queue[0].rows):
                    waiting = queue.popleft()
                    self._pass(waiting.rows)
                    found.append(waiting.message)
                    progress = True
                if not queue:
                    del self._waiting[instance]
        return found
