"""From the runs of several arms to ratios and verdicts. Pure arithmetic.

A ratio compares two arms seed by seed under one load and is averaged geometrically; below 1 is
less. The baseline of every figure is whichever stock arm is best at that figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.arms import Arm, Rate

OVERLOAD_REFERENCE = "rr"
LEAST_GAP = 0.05

Read = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True, slots=True)
class Run:
    """One arm under one load with one seed; `output_tokens` per item."""

    arm: str
    rate: str
    seed: int
    summary: dict[str, Any]
    output_tokens: list[int] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    lag_p99_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds."""

    point: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread | None:
        """Geometric mean and range; None without ratios, or where one is not positive."""
        if not ratios or min(ratios) <= 0:
            return None
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return cls(mean, min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.point:.2f} ({self.low:.2f}..{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Target:
    """One line of a verdict; `passed` None: it could not be judged."""

    name: str
    seen: str
    passed: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "n/a "}[self.passed]
        return f"{word}  {self.name}: {self.seen}"


def key(name: str) -> Read:
    return lambda summary: summary[name]


def bin_tail(index: int) -> Read:
    return lambda summary: summary["tail_ttfo_by_bin"][index]


def by_seed(runs: Sequence[Run], arm: str, rate: str, read: Read) -> dict[int, float]:
    """A figure per seed, without the runs that do not have it."""
    values = {r.seed: read(r.summary) for r in runs if (r.arm, r.rate) == (arm, rate)}
    return {seed: value for seed, value in values.items() if value is not None}


def mean(runs: Sequence[Run], arm: str, rate: str, read: Read) -> float | None:
    values = by_seed(runs, arm, rate, read).values()
    return sum(values) / len(values) if values else None


def best(
    runs: Sequence[Run], arms: Sequence[str], rate: str, read: Read, *, higher: bool = False
) -> str | None:
    """The arm with the best mean over seeds."""
    means = {arm: m for arm in arms if (m := mean(runs, arm, rate, read)) is not None}
    return (max if higher else min)(means, key=means.__getitem__) if means else None


def ratio(runs: Sequence[Run], arm: str, base: str | None, rate: str, read: Read) -> Spread | None:
    """`arm` over `base` on the seeds both ran."""
    if base is None:
        return None
    ours, theirs = by_seed(runs, arm, rate, read), by_seed(runs, base, rate, read)
    return Spread.of([ours[s] / theirs[s] for s in ours if theirs.get(s, 0) > 0])


def gap_closure(stock: float, arm: float, oracle: float) -> float | None:
    """Share of the distance from stock to oracle that the arm covers; None where the distance is
    within noise, so that there is nothing to cover."""
    gap = stock - oracle
    return (stock - arm) / gap if gap > LEAST_GAP * stock else None


def gap_closed(
    runs: Sequence[Run], arm: str, stock: Sequence[str], oracle: str | None, rate: str
) -> float | None:
    """`gap_closure` of mean TTFO, from the best stock arm."""
    read = key("mean_ttfo_ms")
    base = best(runs, stock, rate, read)
    ends = [mean(runs, end, rate, read) for end in (base, arm, oracle) if end is not None]
    known = [end for end in ends if end is not None]
    return gap_closure(*known) if len(known) == 3 else None


def token_mismatches(runs: Sequence[Run]) -> list[str]:
    """Items for which arms disagree on the number of output tokens."""
    wrong = []
    first: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = first.setdefault((run.rate, run.seed), run)
        pairs = zip(other.output_tokens, run.output_tokens, strict=True)
        items = [i for i, (a, b) in enumerate(pairs) if a != b]
        if items:
            wrong.append(
                f"{run.rate}, seed {run.seed}: {run.arm} and {other.arm} differ on "
                f"{len(items)} items, first {items[0]}"
            )
    return wrong


def verdict(
    runs: Sequence[Run],
    arm: Arm,
    rate: Rate,
    stock: Sequence[str],
    bins: int,
    targets: Mapping[str, float],
) -> list[Target]:
    """Every target for one arm under one load, against the best stock arm of each figure."""

    def against(read: Read, *, higher: bool = False) -> Spread | None:
        return ratio(
            runs, arm.name, best(runs, stock, rate.name, read, higher=higher), rate.name, read
        )

    tails = [t for i in range(bins) if (t := against(bin_tail(i))) is not None]
    low, high = (pick(tails, key=lambda t: t.point, default=None) for pick in (min, max))
    figures = {
        "mean_ttfo": ("mean TTFO <= {}x", against(key("mean_ttfo_ms"))),
        "p99_slowdown": ("P99 slowdown <= {}x", against(key("p99_slowdown"))),
        "best_bin": ("tail TTFO of the best bin <= {}x", low),
        "worst_bin": ("tail TTFO of no bin > {}x", high),
        "throughput": ("throughput >= {}x", against(key("output_throughput"), higher=True)),
    }
    lines = [_complete(runs, arm.name, rate.name)]
    for name, (text, seen) in figures.items():
        if name not in targets:
            continue
        limit = targets[name]
        if seen is None:
            lines.append(Target(text.format(f"{limit:g}"), "no data", None))
            continue
        passed = seen.point >= limit if name == "throughput" else seen.point <= limit
        lines.append(Target(text.format(f"{limit:g}"), str(seen), passed))
    if "violations" in targets:
        lines.append(_violations(runs, arm.name, rate, targets["violations"]))
    return lines


def _complete(runs: Sequence[Run], arm: str, rate: str) -> Target:
    """Latencies are over the requests that got that far, so the others must be none."""
    lost = [
        r.summary["failed"] + r.summary["no_answer"] for r in runs if (r.arm, r.rate) == (arm, rate)
    ]
    if not lost:
        return Target("every request answered", "no data", None)
    return Target("every request answered", f"{sum(lost)} were not", sum(lost) == 0)


def _violations(runs: Sequence[Run], arm: str, rate: Rate, most: float) -> Target:
    read = key("slo_violations")
    seen = mean(runs, arm, rate.name, read)
    limit: float | None = most
    name = f"SLO violations <= {100 * most:g} %"
    if rate.overload:
        limit = mean(runs, OVERLOAD_REFERENCE, rate.name, read)
        name = f"SLO violations no more than {OVERLOAD_REFERENCE}"
    if seen is None:
        return Target(name, "no data", None)
    if limit is None:
        return Target(name, f"{100 * seen:.1f} %, {OVERLOAD_REFERENCE} did not run", None)
    return Target(name, f"{100 * seen:.1f} % (limit {100 * limit:.1f} %)", seen <= limit)
