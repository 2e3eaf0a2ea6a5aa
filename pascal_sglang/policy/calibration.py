"""Whether forecasts hold: what was forecast of a request, and what came of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from pascal_sglang.policy.forecast_errors import (
    ARRIVAL,
    EARLY,
    INSIDE,
    LATE,
    WHEN,
    Estimate,
    ForecastErrors,
)
from pascal_sglang.policy.outlook import Course
from pascal_sglang.policy.request import RequestState


class Made(NamedTuple):
    """A forecast whose answer has not begun."""

    at: float
    estimate: Estimate
    course: Course
    # It is known that the answer begins after the range.
    late: bool = False


@dataclass(slots=True, kw_only=True)
class Calibration:
    """Compares forecasts with what came of them, of each request the first in every stretch, and
    lets `errors` learn from it."""

    errors: ForecastErrors = field(default_factory=ForecastErrors)
    # How many forecasts came out how, by when they were made; `by_p50` counts answers that had
    # begun by the median.
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {when: Counter() for when in WHEN}
    )
    _open: dict[RequestState, dict[str, Made]] = field(default_factory=dict)

    def forecast(
        self, request: RequestState, at: float, estimate: Estimate, course: Course
    ) -> None:
        """at: when it was made, in seconds."""
        mine = self._open.setdefault(request, {})
        for made, each in mine.items():
            if not each.late and at - each.at > each.estimate.p90:
                mine[made] = each._replace(late=True)
                self.errors.came_out(made, LATE)
        mine.setdefault(course.made, Made(at, estimate, course))

    def at_arrival(self, request: RequestState) -> Made | None:
        """The forecast at arrival."""
        return self._open.get(request, {}).get(ARRIVAL)

    def followed(self) -> set[RequestState]:
        """Requests whose answers are waited for."""
        return set(self._open)

    def began(self, request: RequestState, now: float, length: float) -> list[tuple[str, str]]:
        """The request's answer begins after a thought of `length` tokens: when its forecasts were
        made, and what came of each."""
        found = []
        for made, (at, estimate, course, known) in self._open.pop(request, {}).items():
            seconds = now - at
            outcome = LATE if seconds > estimate.p90 else INSIDE
            if seconds < estimate.p10:
                outcome = EARLY
            self.counts[made][outcome] += 1
            self.counts[made]["by_p50"] += seconds <= estimate.p50
            found.append((made, outcome))
            self.errors.learn(made, course.expected(length), seconds)
            if not known:
                self.errors.came_out(made, outcome)
        return found

    def gone(self, request: RequestState) -> None:
        """The request has ended without an answer, or has gone elsewhere: that says nothing."""
        self._open.pop(request, None)
