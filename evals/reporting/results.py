"""What a page shows, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evals.reporting.verdict import Target


class ResultError(ValueError):
    """A file that holds no results; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One run. `per_s`: requests per second, None where the arrivals were a file's own.

    edges: inner edges of its thinking-length bins. summary: as the run wrote it; keys may lack.
    """

    arm: str
    rate: str
    per_s: float | None
    seed: int
    edges: tuple[float, ...]
    summary: Mapping[str, Any]
    counters: Mapping[str, float] = field(default_factory=dict)
    lag_p99_ms: float | None = None


@dataclass(slots=True)
class Results:
    """Everything a page shows; whatever a file did not say stays empty."""

    runs: list[Shown] = field(default_factory=list)
    # What was run, in words.
    about: list[str] = field(default_factory=list)
    # By arm: `stock`, `candidate` or `oracle`, and what it is in words.
    roles: dict[str, str] = field(default_factory=dict)
    arm_words: dict[str, str] = field(default_factory=dict)
    # What came out, where the runs do not simply compete.
    conclusions: list[str] = field(default_factory=list)
    # By load and arm.
    verdicts: dict[str, dict[str, list[Target]]] = field(default_factory=dict)
    # What a reader must know before trusting a figure.
    notes: list[str] = field(default_factory=list)
    # How each arm, and the benchmark itself, was started, by name.
    commands: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def loads(self) -> list[tuple[str, float | None]]:
        """Loads from light to heavy; those without a rate come first."""
        seen = dict.fromkeys((run.rate, run.per_s) for run in self.runs)
        return sorted(seen, key=lambda load: -1.0 if load[1] is None else load[1])

    def of(self, arm: str, rate: str) -> list[Shown]:
        """One arm's runs under one load, a run per seed."""
        return [run for run in self.runs if (run.arm, run.rate) == (arm, rate)]
