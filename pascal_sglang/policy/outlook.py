"""What is forecast of one moment: how requests come along, and when their answers begin."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pascal_sglang.policy.forecast_errors import (
    ARRIVAL,
    Estimate,
    Expected,
    Learnt,
    range_of,
)
from pascal_sglang.policy.request import RequestState

# Tokens: the speed of a curve that has risen by less is not known.
LEAST_GAIN = 1e-3


class Course(NamedTuple):
    """How a request comes along, as forecast.

    made: when that was, one of `WHEN`. times, counts: when it has so many tokens, in seconds from
    then on; of which there were `begun` then. token_s: seconds per token while it runs. tokens:
    those of its phase then. more_s: seconds that its prefill takes longer than the curve's.
    """

    made: str
    times: Sequence[float]
    counts: Sequence[float]
    token_s: float
    begun: float = 0.0
    tokens: float = 0.0
    more_s: float = 0.0

    def expected(self, length: float) -> Expected:
        """length: tokens of the whole thought."""
        left = max(1.0, length - self.tokens)
        seconds = max(0.0, self.more_s + seconds_to(self.times, self.counts, self.begun + left))
        busy_s = left * self.token_s + max(0.0, self.more_s)
        return Expected(seconds, max(0.0, 1.0 - busy_s / seconds) if seconds else 0.0)


def seconds_to(times: Sequence[float], counts: Sequence[float], tokens: float) -> float:
    """When a curve reaches so many tokens; beyond it, it goes on as fast as it went altogether."""
    if tokens <= counts[0]:
        return times[0]
    number = bisect_left(counts, tokens)
    if number == len(counts):
        gained = counts[-1] - counts[0]
        if gained < LEAST_GAIN:
            return times[-1]
        return times[-1] + (tokens - counts[-1]) * (times[-1] - times[0]) / gained
    low, high = counts[number - 1], counts[number]
    part = (tokens - low) / (high - low)
    return times[number - 1] + part * (times[number] - times[number - 1])


@dataclass(frozen=True, slots=True)
class ArrivalOutlook:
    """How a request fares that arrives at a given moment.

    times, tokens: when it has so many tokens, in seconds after it. lengths: tokens until its
    answer, at `SHARES`. prompt: tokens of its prompt; each more of them takes
    `prefill_token_s` longer. waits_s: seconds in which it does not run, until the median of its
    answers. token_s: seconds per token while it runs. learnt: of the errors of such forecasts.
    """

    times: Sequence[float]
    tokens: Sequence[float]
    lengths: Sequence[float]
    prompt: float
    prefill_token_s: float
    waits_s: float
    token_s: float
    learnt: Learnt

    def course(self, prompt: float) -> Course:
        """prompt: its tokens."""
        more_s = (prompt - self.prompt) * self.prefill_token_s
        return Course(ARRIVAL, self.times, self.tokens, self.token_s, more_s=more_s)

    @property
    def waits(self) -> float:
        """Share of the time to a usual answer that is spent waiting, as fast-forwarded: it does not
        depend on how far such times are off."""
        usual_s = self.course(self.prompt).expected(self.lengths[1]).seconds
        return self.waits_s / usual_s if usual_s else 0.0

    def estimate(self, prompt: float, *, thinks: bool = True, limit: float = math.inf) -> Estimate:
        """limit: the most tokens that it may think for."""
        course = self.course(prompt)
        sought = [min(limit, length) if thinks else 0.0 for length in self.lengths]
        expected = [course.expected(tokens) for tokens in sought]
        return range_of(expected, self.learnt, self.token_s)


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecast of one moment. at: that moment, in seconds. requests: those whose answer has not
    begun; courses: theirs. arrival: a request that arrives then; by_tenant: the same for tenants
    that are told apart, and `arrival` for one of the others. usual: for one of the tenant that most
    requests are of."""

    at: float
    requests: Mapping[RequestState, Estimate]
    courses: Mapping[RequestState, Course]
    arrival: ArrivalOutlook
    by_tenant: Mapping[str, ArrivalOutlook] = field(default_factory=dict)

    @property
    def usual(self) -> ArrivalOutlook:
        return next(iter(self.by_tenant.values()), self.arrival)
