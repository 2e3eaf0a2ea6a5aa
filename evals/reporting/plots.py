"""The figures of a page. Each takes results and gives SVG, or None where the data is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evals.reporting.report import bin_names
from evals.reporting.results import Results, Shown
from evals.reporting.svg import colour, inline, legend, panels, styled

MANY_ARMS = 3
FEW_REQUESTS = 4
STATE_COLOURS = {
    "queued": "#d9d9d9",
    "thinking": "#0072b2",
    "answering": "#009e73",
    "paused": "#e69f00",
    "moved": "#cc79a7",
    "stalled": "#d55e00",
}


@styled
def ttfo_cdf(results: Results) -> str | None:
    """Share of *all* requests whose answer had begun by then, a panel per load."""
    loads = [
        rate
        for rate, _ in results.loads
        if any(t is not None for r in results.runs if r.rate == rate for t in _ttfos(r))
    ]
    if not loads:
        return None
    figure, axes = panels(len(loads))
    for rate, one in zip(loads, axes, strict=True):
        for arm in results.arms:
            every = [t for run in results.of(arm, rate) for t in _ttfos(run)]
            begun = sorted(t for t in every if t is not None)
            if begun:
                share = np.arange(1, len(begun) + 1) / len(every)
                one.step(begun, share, where="post", label=arm, color=colour(results.arms, arm))
        one.set(title=load_name(results, rate), xlabel="TTFO (s)", ylabel="share of requests")
        one.set_ylim(0, 1.02)
        one.set_xlim(left=0)
    legend(figure, axes)
    return inline(figure, "Distribution of time to first output token, per arm and load")


@styled
def tail_by_bin(results: Results) -> str | None:
    """Tail TTFO per thinking-length bin, each with the count of requests behind it."""
    groups = list(
        dict.fromkeys(
            (run.rate, run.edges)
            for rate, _ in results.loads
            for run in results.runs
            if run.rate == rate and any(t is not None for t in tails(run))
        )
    )
    if not groups:
        return None
    figure, axes = panels(len(groups), (4.6, 2.8))
    width = 0.8 / len(results.arms)
    for (rate, edges), one in zip(groups, axes, strict=True):
        names = bin_names(edges)
        counts: list[set[int]] = [set() for _ in names]
        for place, arm in enumerate(results.arms):
            runs = [run for run in results.of(arm, rate) if run.edges == edges]
            for index in range(len(names)):
                value, count = bin_cell(runs, index)
                if runs:
                    counts[index].add(count)
                if value is not None:
                    at = index + (place - (len(results.arms) - 1) / 2) * width
                    one.bar(at, value, width, color=colour(results.arms, arm), label=arm)
        one.set(title=load_name(results, rate), xlabel="thinking tokens", ylabel="tail TTFO (s)")
        ticks = [f"{name}\nn = {_span(seen)}" for name, seen in zip(names, counts, strict=True)]
        one.set_xticks(range(len(names)), ticks)
    legend(figure, axes)
    return inline(figure, "Tail time to first output token per thinking-length bin")


@styled
def slowdown(results: Results) -> str | None:
    return _against_rate(
        results,
        [
            ("median slowdown", lambda s: s.get("median_slowdown")),
            ("P99 slowdown", lambda s: s.get("p99_slowdown")),
        ],
        "Slowdown against load",
        ratio=True,
    )


@styled
def attainment_and_throughput(results: Results) -> str | None:
    return _against_rate(
        results,
        [
            ("QoE SLO attainment (%)", _kept),
            ("goodput (req/s)", lambda s: s.get("request_goodput")),
            ("output throughput (tok/s)", lambda s: s.get("output_throughput")),
        ],
        "SLO attainment, goodput and throughput against load",
    )


@styled
def timelines(results: Results, rate: str) -> str | None:
    """A few requests of one load's first seed, each under every arm."""
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
    figure, (one,) = panels(1, (10.0, 0.9 + 0.22 * len(rows) + 0.16 * len(wanted)))
    places, labels, top = [], [], 0.0
    for index, (number, arm) in enumerate(rows):
        told = by_arm[arm][number]
        if index == 0 or rows[index - 1][0] != number:
            top += 0.7
            said = f"request {number}: {told['thinking_tokens']} thinking tokens"
            one.text(0, top - 0.8, said, fontsize=8, va="center")
        for state, start, end in told["segments"]:
            one.barh(top, end - start, 0.8, start, color=STATE_COLOURS[state], label=state)
        if told.get("error"):
            one.text(told["segments"][-1][2], top, " failed", fontsize=7, va="center")
        places.append(top)
        labels.append(arm)
        top += 1.0
    one.set_yticks(places, labels)
    one.set_ylim(top - 0.4, -0.5)
    one.set(xlabel="seconds after the request was due", title=load_name(results, rate))
    one.grid(visible=False, axis="y")
    legend(figure, [one])
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


def _kept(summary: Any) -> float | None:
    violated = summary.get("slo_violations")
    return None if violated is None else 100 * (1 - violated)


def _against_rate(
    results: Results,
    figures: Sequence[tuple[str, Callable[[Any], float | None]]],
    label: str,
    *,
    ratio: bool = False,
) -> str | None:
    """Means over seeds with their range, a panel per figure that any run has. `ratio`: figures that
    stand above 1, some far."""
    present = [
        (name, read)
        for name, read in figures
        if any(read(run.summary) is not None for run in results.runs)
    ]
    if not present:
        return None
    figure, axes = panels(len(present))
    rates = [per_s for _, per_s in results.loads]
    # Places instead of numbers where a load has none, such as "all at once".
    numeric = all(r is not None and math.isfinite(r) for r in rates) and len(set(rates)) > 1
    for (name, read), one in zip(present, axes, strict=True):
        for arm in results.arms:
            _series(one, results, arm, read, numeric)
        one.set(title=name, xlabel="requests per second" if numeric else "load")
        if ratio:
            _logarithmic(one)
        else:
            one.set_ylim(0, 1.05 * one.get_ylim()[1])
        if not numeric:
            names = [load_name(results, rate) for rate, _ in results.loads]
            one.set_xticks(range(len(rates)), names)
            one.set_xlim(-0.5, len(rates) - 0.5)
    legend(figure, axes)
    return inline(figure, label)


def _logarithmic(one: Axes) -> None:
    """From 1 on, with labels close enough that a range of less than 10 has some."""
    one.set_yscale("log")
    low, high = min(1.0, one.get_ylim()[0]), one.get_ylim()[1]
    one.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 else (1, 2, 5)))
    one.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.yaxis.set_minor_formatter(NullFormatter())
    one.set_ylim(low, 1.05 * high)


def _series(
    one: Axes, results: Results, arm: str, read: Callable[[Any], float | None], numeric: bool
) -> None:
    at, mean, low, high = [], [], [], []
    aside = _aside(results, arm, numeric)
    for place, (rate, per_s) in enumerate(results.loads):
        values = [v for run in results.of(arm, rate) if (v := read(run.summary)) is not None]
        if values:
            at.append((per_s if numeric and per_s is not None else place) + aside)
            mean.append(sum(values) / len(values))
            low.append(mean[-1] - min(values))
            high.append(max(values) - mean[-1])
    if at:
        ours = colour(results.arms, arm)
        one.errorbar(at, mean, [low, high], label=arm, color=ours, marker="o", ms=3, capsize=2)


def _aside(results: Results, arm: str, numeric: bool) -> float:
    """How far an arm's points stand beside their load, so that none hides another."""
    rates = [per_s for _, per_s in results.loads if per_s is not None]
    width = 0.04 * (max(rates) - min(rates)) if numeric else 0.6
    arms = results.arms
    return width * (arms.index(arm) / (len(arms) - 1) - 0.5) if len(arms) > 1 else 0.0
