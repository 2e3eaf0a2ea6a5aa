"""The figures of a page: each takes results and gives its panels as SVG, none where the data is not
there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from evals.reporting.report import bin_names
from evals.reporting.results import Results, Shown
from evals.reporting.svg import inline, looks, panel, styled

MANY_ARMS = 3
MANY_BINS = 5
FEW_REQUESTS = 4
# Loads nearer than this share of the axis stand evenly apart, so that their names do not overlap.
NEAREST_LOADS = 0.15
STATE_COLOURS = {
    "queued": "#d9d9d9",
    "thinking": "#0072b2",
    "answering": "#009e73",
    "paused": "#e69f00",
    "moved": "#cc79a7",
    "stalled": "#d55e00",
}
Read = Callable[[Mapping[str, Any]], float | None]


def ttfo_against_load(results: Results) -> list[str]:
    return _against_load(
        results,
        [
            ("mean TTFO (s)", lambda s: _scaled(s.get("mean_ttfo_ms"), 1e-3)),
            ("P99 TTFO (s)", lambda s: _scaled(s.get("p99_ttfo_ms"), 1e-3)),
        ],
        logarithmic=True,
    )


@styled
def ttfo_cdf(results: Results) -> list[str]:
    """Share of *all* requests whose answer had begun by then, a panel per load."""
    drawn = []
    for rate, _ in results.loads:
        every = {arm: [t for r in results.of(arm, rate) for t in _ttfos(r)] for arm in results.arms}
        begun = {arm: sorted(t for t in ts if t is not None) for arm, ts in every.items()}
        if not any(begun.values()):
            continue
        figure, one = panel()
        for arm, look in looks(results.arms).items():
            if begun[arm]:
                share = np.arange(1, len(begun[arm]) + 1) / len(every[arm])
                one.step(begun[arm], share, where="post", color=look.colour, ls=look.line)
        one.set(title=load_name(results, rate), xlabel="TTFO (s)", ylabel="share of requests")
        one.set_ylim(0, 1.02)
        _logarithmic(one, "x")
        drawn.append(inline(figure, f"Distribution of TTFO under {rate}"))
    return drawn


@styled
def tail_by_bin(results: Results) -> list[str]:
    """Tail TTFO per thinking-length bin that has requests, each with their count."""
    groups = dict.fromkeys(
        (run.rate, run.edges)
        for rate, _ in results.loads
        for run in results.runs
        if run.rate == rate and any(t is not None for t in tails(run))
    )
    drawn = []
    for rate, edges in groups:
        figure, one = panel()
        cells = {
            arm: [bin_cell(runs, index) for index in range(len(edges) + 1)]
            for arm in results.arms
            if (runs := [run for run in results.of(arm, rate) if run.edges == edges])
        }
        names = {
            index: f"{name}\nn = {_span(counts)}"
            for index, name in enumerate(bin_names(edges))
            if any(counts := {of_arm[index][1] for of_arm in cells.values()})
        }
        for place, (arm, look) in enumerate(looks(results.arms).items()):
            aside = 0.5 * _aside(place, len(results.arms))
            known = [
                (place_of_bin + aside, value)
                for place_of_bin, index in enumerate(names if arm in cells else ())
                if (value := cells[arm][index][0]) is not None
            ]
            if known:
                at, tail = zip(*known, strict=True)
                one.plot(at, tail, c=look.colour, ls=look.line, marker=look.marker, ms=4, lw=0.8)
        one.set(title=load_name(results, rate), xlabel="thinking tokens", ylabel="tail TTFO (s)")
        one.set_xticks(
            range(len(names)), list(names.values()), fontsize=7 if len(names) > MANY_BINS else None
        )
        _logarithmic(one, "y")
        drawn.append(inline(figure, f"Tail TTFO by thinking length under {rate}"))
    return drawn


def slowdown(results: Results) -> list[str]:
    return _against_load(
        results,
        [
            ("median slowdown", lambda s: s.get("median_slowdown")),
            ("P99 slowdown", lambda s: s.get("p99_slowdown")),
        ],
        logarithmic=True,
    )


def violations_and_throughput(results: Results) -> list[str]:
    return _against_load(
        results,
        [
            ("SLO violations (%)", lambda s: _scaled(s.get("slo_violations"), 100)),
            ("goodput (req/s)", lambda s: s.get("request_goodput")),
            ("output throughput (tok/s)", lambda s: s.get("output_throughput")),
        ],
    )


@styled
def timelines(results: Results) -> list[str]:
    """A few requests of each load's first seed, each under every arm."""
    return [drawn for rate, _ in results.loads if (drawn := _timelines(results, rate))]


def _timelines(results: Results, rate: str) -> str | None:
    by_arm = {
        arm: {t["request"]: t for t in runs[0].summary.get("timelines", ())}
        for arm in results.arms
        if (runs := sorted(results.of(arm, rate), key=lambda run: run.seed))
    }
    wanted = sorted(
        {(t["thinking_tokens"], number) for each in by_arm.values() for number, t in each.items()}
    )
    if not wanted:
        return None
    if len(by_arm) > MANY_ARMS and len(wanted) > FEW_REQUESTS:
        picks = np.linspace(0, len(wanted) - 1, FEW_REQUESTS)
        wanted = [wanted[round(pick)] for pick in picks]
    rows = [(n, arm) for _, n in wanted for arm in by_arm if n in by_arm[arm]]
    figure, one = panel((10.0, 0.9 + 0.22 * len(rows) + 0.16 * len(wanted)))
    places, labels, top = [], [], 0.0
    for index, (number, arm) in enumerate(rows):
        told = by_arm[arm][number]
        if index == 0 or rows[index - 1][0] != number:
            top += 0.7
            said = f"request {number}: {told['thinking_tokens']} thinking tokens"
            one.text(0, top - 0.8, said, fontsize=8, va="center")
        for state, start, end in told["segments"]:
            one.barh(top, end - start, 0.8, start, color=STATE_COLOURS[state])
        if told.get("error"):
            one.text(told["segments"][-1][2], top, " failed", fontsize=7, va="center")
        places.append(top)
        labels.append(arm)
        top += 1.0
    one.set_yticks(places, labels)
    one.set_ylim(top - 0.4, -0.5)
    one.set(xlabel="seconds after the request was due", title=load_name(results, rate))
    one.grid(visible=False, axis="y")
    return inline(figure, f"What a few requests went through under {rate}")


def _ttfos(run: Shown) -> list[float | None]:
    found: list[float | None] = run.summary.get("ttfos", [])
    return found


def tails(run: Shown) -> list[float | None]:
    found: list[float | None] = run.summary.get("tail_ttfo_by_bin", [])
    return found


def bin_cell(runs: Sequence[Shown], index: int) -> tuple[float | None, int]:
    """Mean over seeds of a bin's tail in seconds, and how many requests all of them had there."""
    values = [t for run in runs if index < len(tails(run)) and (t := tails(run)[index]) is not None]
    counts = [run.summary.get("bin_requests", []) for run in runs]
    total = sum(each[index] for each in counts if index < len(each))
    return (sum(values) / len(values) if values else None), total


def _span(counts: set[int]) -> str:
    """One number where all arms have the same, else the least and the most."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def load_name(results: Results, rate: str) -> str:
    """The load's name, with its requests per second where the name does not say them."""
    per_s = dict(results.loads)[rate]
    known = per_s is not None and math.isfinite(per_s) and not rate.endswith("/s")
    return f"{rate}, {per_s:g}/s" if known else rate


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else unit * value


@styled
def _against_load(
    results: Results, figures: Sequence[tuple[str, Read]], *, logarithmic: bool = False
) -> list[str]:
    """Means over seeds with their range, a panel per figure that any run has."""
    drawn = []
    places = _load_places(results)
    span = max(places) - min(places) or 1.0
    for name, read in figures:
        if all(read(run.summary) is None for run in results.runs):
            continue
        figure, one = panel()
        for index, (arm, look) in enumerate(looks(results.arms).items()):
            # Beside their load, so that no arm hides another.
            aside = 0.12 * span * _aside(index, len(results.arms))
            at, mean, low, high = [], [], [], []
            for place, (rate, _) in zip(places, results.loads, strict=True):
                values = [
                    v for run in results.of(arm, rate) if (v := read(run.summary)) is not None
                ]
                if values:
                    at.append(place + aside)
                    mean.append(sum(values) / len(values))
                    low.append(mean[-1] - min(values))
                    high.append(max(values) - mean[-1])
            if at:
                one.errorbar(
                    at,
                    mean,
                    [low, high],
                    elinewidth=0.8,
                    capsize=2,
                    lw=1.2,
                    ms=4,
                    color=look.colour,
                    ls=look.line,
                    marker=look.marker,
                )
        one.set(title=name, xlabel="load")
        if logarithmic:
            _logarithmic(one, "y")
        elif _data_range(one, "y")[0] <= 0:
            top = _data_range(one, "y")[1] or 1.0
            one.set_ylim(-0.03 * top, 1.05 * top)
        names = [load_name(results, rate).replace(", ", "\n") for rate, _ in results.loads]
        one.set_xticks(places, names)
        one.set_xlim(min(places) - 0.15 * span, max(places) + 0.15 * span)
        drawn.append(inline(figure, f"{name} against load"))
    return drawn


def _load_places(results: Results) -> list[float]:
    """Where loads stand on an axis: at their requests per second, or evenly apart where a load has
    none, such as "all at once", or where two nearly agree."""
    rates = [per_s for _, per_s in results.loads]
    known = [r for r in rates if r is not None and math.isfinite(r)]
    if len(known) == len(rates) > 1:
        gaps = [b - a for a, b in itertools.pairwise(known)]
        if min(gaps) > NEAREST_LOADS * sum(gaps):
            return known
    return [float(place) for place in range(len(rates))]


def _logarithmic(one: Axes, axis: str) -> None:
    """With labels close enough that a range of less than 10 has some."""
    low, high = _data_range(one, axis)
    if not 0 < low <= high:
        return
    ours = getattr(one, f"{axis}axis")
    getattr(one, f"set_{axis}scale")("log")
    ours.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)))
    if high < 1.5 * low:
        ours.set_major_locator(
            FixedLocator([float(f"{v:.3g}") for v in np.geomspace(low, high, 4)])
        )
    ours.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ours.set_minor_locator(NullLocator())
    ours.set_minor_formatter(NullFormatter())


def _data_range(one: Axes, axis: str) -> tuple[float, float]:
    """Of all that was drawn."""
    limits = one.dataLim
    return (limits.x0, limits.x1) if axis == "x" else (limits.y0, limits.y1)


def _aside(place: int, count: int) -> float:
    """From -0.5 for the first of `count` to 0.5 for the last."""
    return place / (count - 1) - 0.5 if count > 1 else 0.0
