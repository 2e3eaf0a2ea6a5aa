"""What an instance learns of its requests, so that their answers can be forecast (`fast_forward`):
how long they think and answer, how fast they come along, and how many will come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pascal_sglang.policy.arrivals import Arrivals
from pascal_sglang.policy.fairness import TenantCounters
from pascal_sglang.policy.forecast_errors import SHARES, ForecastErrors
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.length_table import ANSWERS, THINKING, LengthTable
from pascal_sglang.policy.ranking import Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

# Part of a measured speed that the next one replaces.
LEARNS = 0.2
# Part of the time between two looks in which requests have decoded, for their speed to be known.
LEAST_DECODING = 0.25
# Part of it that prefills may take without being taken out: so they hold up those that run.
USUAL_PREFILLS = 0.25
# Requests that are gone through at once: a fraction of a millisecond.
PORTION = 64


class Seen(NamedTuple):
    """A request at the last look, at `at`, when prefills had taken `prefill_s` in all: `tokens` of
    its phase, all of them, and since when it has its status."""

    at: float
    prefill_s: float
    phase: Phase
    tokens: int
    total_tokens: int
    since: float

    def tokens_in(self, phase: Phase) -> int:
        """What was known of a phase."""
        return self.tokens if self.phase is phase else 0


class Forecaster:
    """Learns lengths and speed of one instance."""

    def __init__(self, policy: Policy, tuning: Tuning, tpot: float) -> None:
        """tpot: the reader's pace of requests that ask for none, in seconds per token."""
        self.policy = policy
        self.tuning = tuning
        self.tpot = tpot
        # Where tenants are told apart, which `policy` does not do.
        self.tenants: TenantCounters | None = None
        self.thinking = LengthTable(THINKING)
        self.answers = LengthTable(ANSWERS)
        # Of thoughts as they ended, by themselves or not: those of requests that will come do too.
        self.thoughts = LengthTable(THINKING)
        self.errors = ForecastErrors()
        self.arrivals = Arrivals()
        # Seconds per token of a request that runs, measured, and how many ran beside it.
        self.token_s = 0.0
        self.batch = 0.0
        # The requests that were here at the last look.
        self._seen: dict[RequestState, Seen] = {}

    def look(self, present: Iterable[RequestState], now: float, costs: Costs | None = None) -> None:
        """Learn from how far the requests that are here have come since the last look. costs: what
        prefills take, which is not the speed of those that run."""
        for _ in self.looking(present, lambda: now, costs or Costs()):
            pass

    def looking(
        self, present: Iterable[RequestState], clock: Callable[[], float], costs: Costs
    ) -> Iterator[None]:
        """The same, a portion of the requests at a time, each at the time that it is then."""
        speeds: list[float] = []
        running = 0
        here: set[RequestState] = set()
        for number, state in enumerate(present, 1):
            here.add(state)
            before = self._seen.get(state)
            phase, tokens = state.phase, state.phase_tokens
            runs = state.status is RequestStatus.RUNNING
            running += runs and state.total_tokens > 0
            for table in self._tables(phase):
                table.passed(0 if before is None else before.tokens_in(phase), tokens)
            now, prefill_s = clock(), costs.prefill_s
            if before is not None and runs and before.since == state.since and before.total_tokens:
                seconds, prefills_s = now - before.at, prefill_s - before.prefill_s
                if prefills_s > USUAL_PREFILLS * seconds:
                    seconds -= prefills_s
                # Of less than that nothing is known: a prefill is counted when it has ended.
                if seconds > LEAST_DECODING * (now - before.at):
                    speeds.append((state.total_tokens - before.total_tokens) / seconds)
            self._seen[state] = Seen(now, prefill_s, phase, tokens, state.total_tokens, state.since)
            if number % PORTION == 0:
                yield
        self._seen = {state: seen for state, seen in self._seen.items() if state in here}
        speeds = sorted(speed for speed in speeds if speed > 0)
        if speeds:
            token_s = 1 / speeds[len(speeds) // 2]
            part = LEARNS if self.token_s else 1.0
            self.token_s += part * (token_s - self.token_s)
            self.batch += part * (running - self.batch)

    def _tables(self, phase: Phase) -> tuple[LengthTable, ...]:
        return (self.thinking, self.thoughts) if phase is Phase.REASONING else (self.answers,)

    def ended(self, state: RequestState, phase: Phase, tokens: int, *, cut: bool = False) -> None:
        """A phase of the request has ended after `tokens`. cut: by a limit, an abort, an error."""
        before = self._seen.get(state)
        known = 0 if before is None else before.tokens_in(phase)
        for table in self._tables(phase):
            if cut and table is not self.thoughts:
                table.passed(known, tokens)
            else:
                table.ended(known, tokens)

    def lengths(self, tokens: float, limit: float) -> list[float]:
        """Quantiles of the thinking tokens of a request that has `tokens` and may get `limit`
        more."""
        return [min(tokens + limit, each) for each in self.thinking.quantiles(SHARES, tokens)]
