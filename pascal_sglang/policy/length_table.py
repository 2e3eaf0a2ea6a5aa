"""How long thoughts and answers get here, given how long they already are.

A life table: per bin of length, how many requests came into it and how many ended in it. Requests
that are cut short, and those that still go on, count as far as they came, so that what ends first
does not make everything look short.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

# Beginnings of the bins in tokens: four to an octave.
EDGES = tuple(dict.fromkeys(round(2 ** (quarter / 4)) for quarter in range(4 * 18 + 1)))
# Requests of one bin that count: each new one takes this share from what the earlier ones say.
FADES = 1 / 500
# Requests per bin that the seed stands for.
SEED_REQUESTS = 3.0
# The most that may end in a bin, as a share: a table never says that nothing can be longer.
MOST_ENDED = 0.98

# Tokens below which a share of lengths is: (share, tokens). Computed from the ServeGen
# distributions of DeepSeek-R1 (`sim/loads/servegen_r1.json`), 400,000 samples.
Shape = Sequence[tuple[float, int]]
THINKING: Shape = (
    (0.0, 2), (0.05, 141), (0.1, 180), (0.2, 256), (0.3, 333), (0.4, 408), (0.5, 494), (0.6, 612),
    (0.7, 843), (0.8, 1214), (0.9, 2291), (0.95, 4145), (0.99, 10839), (0.999, 19305),
)  # fmt: skip
ANSWERS: Shape = (
    (0.0, 1), (0.05, 11), (0.1, 24), (0.2, 53), (0.3, 86), (0.4, 131), (0.5, 192), (0.6, 274),
    (0.7, 411), (0.8, 675), (0.9, 1012), (0.95, 1637), (0.99, 4092), (0.999, 8426),
)  # fmt: skip


class LengthTable:
    """Learns lengths in tokens; `seed` is their shape until there is data. Memory is constant."""

    def __init__(self, seed: Shape) -> None:
        self._came = [SEED_REQUESTS] * (len(EDGES) - 1)
        self._ended = [SEED_REQUESTS * share for share in _ended_shares(seed)]
        # Requests that have ended since the start.
        self.learnt = 0
        self._hazard: list[float] | None = None

    def passed(self, before: int, tokens: int) -> None:
        """A request that had `before` tokens has `tokens`, and goes on or was cut short."""
        for number in range(_bin(before), _bin(tokens)):
            self._count(number, 0.0)

    def ended(self, before: int, tokens: int) -> None:
        """A request that had `before` tokens when `passed` last heard of it has ended at `tokens`,
        of itself."""
        self.passed(before, tokens)
        self._count(_bin(tokens), 1.0)
        self.learnt += 1

    def _count(self, number: int, ended: float) -> None:
        self._came[number] += 1 - FADES * self._came[number]
        self._ended[number] += ended - FADES * self._ended[number]
        self._hazard = None

    def survival(self, tokens: float, given: float = 0.0) -> float:
        """Share of requests with more than `tokens` among those with more than `given`."""
        return math.exp(min(0.0, self._at(given) - self._at(tokens)))

    def quantile(self, share: float, given: float = 0.0) -> float:
        """Tokens in all that `share` of the requests with more than `given` do not exceed."""
        return self.quantiles((share,), given)[0]

    def quantiles(self, shares: Sequence[float], given: float = 0.0) -> list[float]:
        """`quantile` of several shares."""
        hazards, begun, found = self.hazards, self._at(given), []
        for share in shares:
            sought = begun - math.log1p(-share)
            number = min(bisect_right(hazards, sought) - 1, len(EDGES) - 2)
            low, high = hazards[number], hazards[number + 1]
            part = min(1.0, (sought - low) / (high - low)) if high > low else 1.0
            found.append(max(given, EDGES[number] + part * (EDGES[number + 1] - EDGES[number])))
        return found

    @property
    def hazards(self) -> list[float]:
        """The cumulated hazard at each of `EDGES`."""
        if self._hazard is None:
            shares = (
                min(MOST_ENDED, ended / came)
                for ended, came in zip(self._ended, self._came, strict=True)
            )
            self._hazard = [0.0, *accumulate(-math.log1p(-share) for share in shares)]
        return self._hazard

    def _at(self, tokens: float) -> float:
        hazards, number = self.hazards, _bin(tokens)
        begin, end = EDGES[number], EDGES[number + 1]
        part = min(1.0, max(0.0, (tokens - begin) / (end - begin)))
        return hazards[number] + part * (hazards[number + 1] - hazards[number])


def _bin(tokens: float) -> int:
    return min(max(0, bisect_right(EDGES, tokens) - 1), len(EDGES) - 2)


def _ended_shares(seed: Shape) -> list[float]:
    """Of requests that come into a bin, the share that ends in it; behind the last point of the
    seed, as in the last bin before it."""
    found: list[float] = []
    last = MOST_ENDED / 4
    for begin, end in pairwise(EDGES):
        below, beyond = _share_below(seed, begin), _share_below(seed, end)
        if end <= seed[-1][1]:
            last = (beyond - below) / (1 - below)
        found.append(last)
    return found


def _share_below(seed: Shape, tokens: int) -> float:
    number = bisect_right(seed, tokens, key=lambda point: point[1])
    if number == 0:
        return 0.0
    if number == len(seed):
        return seed[-1][0]
    (share, low), (more, high) = seed[number - 1], seed[number]
    return share + (more - share) * math.log(tokens / low) / math.log(high / low)
