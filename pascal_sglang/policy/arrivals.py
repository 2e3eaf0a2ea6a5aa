"""Requests that came lately: how many, and what they are like."""

from __future__ import annotations

import math
from typing import NamedTuple

# Seconds for which arrivals are remembered: lately, and in the long run.
ARRIVALS_S = 120.0
LONG_RUN_S = 900.0
# Of a server that has just started, the time seen counts as no less than this.
LEAST_S = 30.0
# For how many times as long as they have been seen arrivals go on.
GO_ON = 2.0


class Rates(NamedTuple):
    """Requests per second that will come: `first` at first, and later `last`. What `first` is above
    `last` fades within about `lasts_s` seconds: of a burst out of idleness `GO_ON` times as many
    come again as have come."""

    first: float
    last: float
    lasts_s: float

    def between(self, begin_s: float, end_s: float) -> float:
        """How many come from `begin_s` to `end_s`, in seconds from now on."""
        begun, ended = (math.exp(-at / self.lasts_s) for at in (begin_s, end_s))
        extra = (self.first - self.last) * self.lasts_s * (begun - ended)
        return self.last * (end_s - begin_s) + extra


class Arrivals:
    """The rate of arrivals and what they are like, over the last `ARRIVALS_S` seconds."""

    def __init__(self) -> None:
        self._count = 0.0
        self._long_run = 0.0
        self._thinking = 0.0
        self._prompts = 0.0
        self._began: float | None = None
        self._at = 0.0

    def add(self, now: float, prompt: int, thinks: bool) -> None:
        self._fade(now)
        self._count += 1
        self._long_run += 1
        self._thinking += thinks
        self._prompts += prompt

    def _fade(self, now: float) -> None:
        if self._began is None:
            self._began = self._at = now
        passed = max(0.0, now - self._at)
        kept = math.exp(-passed / ARRIVALS_S)
        self._long_run *= math.exp(-passed / LONG_RUN_S)
        self._at = max(self._at, now)
        self._count *= kept
        self._thinking *= kept
        self._prompts *= kept

    def rates(self, now: float) -> Rates:
        """Those of requests that will come. Before the first one there were none."""
        self._fade(now)
        assert self._began is not None
        seen_s = ARRIVALS_S * -math.expm1(-max(LEAST_S, now - self._began) / ARRIVALS_S)
        first = self._count / seen_s
        return Rates(first, min(first, self._long_run / LONG_RUN_S), GO_ON * seen_s)

    @property
    def prompt(self) -> float:
        """Mean prompt tokens."""
        return self._prompts / self._count if self._count else 0.0

    @property
    def thinks(self) -> float:
        """Share of requests that think."""
        return self._thinking / self._count if self._count else 1.0
