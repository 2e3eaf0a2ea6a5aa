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
    """Everything a page shows; whatever a file did not say stays empty.

    about: what was run, in words. commands: how each arm, and the benchmark itself, was started, by
    name. verdicts: by load and arm. notes: what a reader must know before trusting a figure.
    """

    runs: list[Shown] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, dict[str, list[Target]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
