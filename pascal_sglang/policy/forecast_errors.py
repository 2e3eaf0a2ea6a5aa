"""How far forecasts of the time to an answer were off here, and the ranges that follow from it.

A forecast knows neither how long a thought gets nor how fast the request comes along: who else will
come, who ends, how long steps take. `LengthTable` learns the one. This learns the other: once an
answer has begun its length is known, and so is the time that was forecast for that length. The
ratio of the two is the error that is left. It depends on when the forecast was made, and on how
much of the time is spent waiting for a place. Ranges hold as many of the errors to come as of those
seen lately (split conformal prediction), and are then made wider or narrower until as many answers
as they promise begin inside (adaptive conformal inference, Gibbs and Candès 2021).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

# A range is from the first to the last of these, as shares of answers that have begun by then.
SHARES = (0.1, 0.5, 0.9)
# What a forecast is called by when it was made: when the request arrived, while it had no token, or
# so many seconds after its first token.
ARRIVAL, WAITING = "arrival", "waiting"
STRETCHES = (0.0, 10.0, 30.0, 90.0)
WHEN = (ARRIVAL, WAITING, *(f"{begin:g}s" for begin in STRETCHES))
# What came of a forecast: the answer began before its range, inside it, or after it.
EARLY, INSIDE, LATE = OUTCOMES = ("early", "inside", "late")
# Shares of the time spent waiting that set errors apart.
WAITS = (0.1, 0.4)
# Errors that count, and how many it takes to go by them.
MOST, LEAST = 128, 10
# By how much one answer outside, of ten, makes ranges wider, as a logarithm; nine inside make them
# as much narrower. The first by `FIRST_STEP`, those after `n` others by that over the root of `n`.
FIRST_STEP, LEAST_STEP = 1.5, 0.05
# Bounds of how much wider they get.
NARROWEST, WIDEST = -1.0, 3.0
# Added to both times of a ratio, in seconds: less than this is no error.
SHIFT_S = 0.05
# The largest error, as a logarithm.
LARGEST = 7.0

# Logarithms of the ratio, at each of `SHARES`.
Errors = tuple[float, float, float]
# Until there are some, by `WAITS`. Found in simulations of ServeGen's requests on an instance of
# 16,800 KV tokens at loads 0.7 to 1.3 (`sim.experiments.calibration`, all with budgets).
SEEDS: tuple[Errors, ...] = ((-0.08, 0.01, 0.15), (-0.3, -0.1, 0.3), (-1.5, -0.4, 1.2))
# Of forecasts made at one time: their errors by `WAITS`, and how much wider than those the range
# is, towards its beginning and its end, as logarithms.
Learnt = tuple[Sequence[Errors], float, float]


class Estimate(NamedTuple):
    """Seconds until a request's first answering token."""

    p10: float
    p50: float
    p90: float


class Expected(NamedTuple):
    """What is forecast for one length of a thought: seconds, and what share of them it waits."""

    seconds: float
    waits: float


def made_at(thinks_s: float | None) -> str:
    """What a forecast is called that is made so many seconds after the first token, None before."""
    return WAITING if thinks_s is None else WHEN[1 + bisect_right(STRETCHES, max(0.0, thinks_s))]


class Recent:
    """The last errors of one kind."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._in_order: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, error: float) -> None:
        if len(self._recent) == MOST:
            del self._in_order[bisect_left(self._in_order, self._recent.popleft())]
        self._recent.append(error)
        insort(self._in_order, error)

    def errors(self) -> Errors:
        """At `SHARES`: the next error is beyond the outer two with no more than the probability
        that is left there."""
        found, count = self._in_order, len(self._in_order)
        low, high = (count + 1) * SHARES[0], (count + 1) * SHARES[-1]
        return (
            found[max(0, math.floor(low) - 1)],
            (found[(count - 1) // 2] + found[count // 2]) / 2,
            found[min(count, math.ceil(high)) - 1],
        )


class ForecastErrors:
    """Learns errors. Memory is constant."""

    def __init__(self) -> None:
        self._recent = {made: tuple(Recent() for _ in SEEDS) for made in WHEN}
        self._wider = {made: [0.0, 0.0] for made in WHEN}
        self._came_out = dict.fromkeys(WHEN, 0)
        self._learnt: dict[str, Learnt] = {}

    def learn(self, made: str, expected: Expected, seconds: float) -> None:
        """An answer has begun `seconds` after a forecast. expected: what that said of the length
        that came."""
        ratio = (max(0.0, seconds) + SHIFT_S) / (expected.seconds + SHIFT_S)
        error = min(max(math.log(ratio), -LARGEST), LARGEST)
        self._recent[made][bisect_right(WAITS, expected.waits)].add(error)
        self._learnt.pop(made, None)

    def came_out(self, made: str, outcome: str) -> None:
        """What came of a range is known: late, as soon as it is over."""
        self._came_out[made] += 1
        step = max(LEAST_STEP, FIRST_STEP / math.sqrt(self._came_out[made]))
        wider = self._wider[made]
        for side, (missed, promised) in enumerate(((EARLY, SHARES[0]), (LATE, 1 - SHARES[-1]))):
            more = step * ((outcome == missed) - promised)
            wider[side] = min(max(wider[side] + more, NARROWEST), WIDEST)
        self._learnt.pop(made, None)

    def of(self, made: str) -> Learnt:
        """What is known of forecasts made at this time."""
        if made not in self._learnt:
            errors = [
                recent.errors() if len(recent) >= LEAST else seed
                for recent, seed in zip(self._recent[made], SEEDS, strict=True)
            ]
            below, above = self._wider[made]
            self._learnt[made] = errors, below, above
        return self._learnt[made]


def range_of(expected: Sequence[Expected], learnt: Learnt, least_s: float = 0.0) -> Estimate:
    """The range of a request. expected: at the quantiles `SHARES` of its length. least_s: no answer
    begins sooner, whatever was learnt.

    The length and the error are two independent things that are open. They are put together as
    logarithms, each side of the range like the sides of a right angle: if the length is known, the
    range is that of the errors.
    """
    by_waits, wider_below, wider_above = learnt
    errors = [by_waits[bisect_right(WAITS, each.waits)] for each in expected]
    low, middle, high = (
        math.log(each.seconds + SHIFT_S) + error[1]
        for each, error in zip(expected, errors, strict=True)
    )
    below = math.hypot(max(0.0, middle - low), errors[0][1] - errors[0][0])
    above = math.hypot(max(0.0, high - middle), errors[-1][2] - errors[-1][1])
    ends = (
        middle - max(0.0, below + wider_below),
        middle,
        middle + max(0.0, above + wider_above),
    )
    return Estimate(*(max(least_s, math.exp(end) - SHIFT_S) for end in ends))
