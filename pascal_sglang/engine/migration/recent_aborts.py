"""Aborts that found no request here: one may be on its way."""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED = 1024
LASTS_S = 30.0


class RecentAborts:
    """Names, or beginnings of names, of requests that were aborted lately."""

    def __init__(self) -> None:
        self._aborted: OrderedDict[str, float] = OrderedDict()

    def add(self, rid: str, now: float) -> None:
        self._aborted[rid] = now
        self._aborted.move_to_end(rid)
        while len(self._aborted) > REMEMBERED:
            self._aborted.popitem(last=False)

    def covers(self, rid: str, now: float) -> bool:
        """Whether a request of that name was aborted in the last `LASTS_S` seconds."""
        while self._aborted:
            oldest, at = next(iter(self._aborted.items()))
            if now - at <= LASTS_S:
                break
            del self._aborted[oldest]
        return any(rid.startswith(name) for name in self._aborted)
