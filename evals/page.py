"""A self-contained HTML page of results: no script, no network, one file.

`python -m evals.page result.json [more.jsonl ...] --out page.html` reads what any tool here wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evals.load.timeline import STALL_FACTOR
from evals.reporting import plots, words
from evals.reporting.report import SECTIONS, STATISTICS, bin_names, totals
from evals.reporting.result_files import load
from evals.reporting.results import ResultError, Results, Shown
from evals.reporting.svg import Look, looks
from evals.reporting.verdict import Target

EXIT_BAD_INPUT = 2
LAG = "lag_p99_ms"
TOTALS = (
    ("accuracy (share)", "accuracy"),
    ("completed", "completed"),
    ("failed", "failed"),
    ("no answer", "no_answer"),
    ("duration (s)", "duration"),
    ("input tokens", "total_input_tokens"),
    ("output tokens", "total_output_tokens"),
    ("reasoning tokens", "reasoning_tokens"),
    ("answer tokens", "answer_tokens"),
    ("request throughput (req/s)", "request_throughput"),
    ("request goodput (req/s)", "request_goodput"),
    ("output throughput (tok/s)", "output_throughput"),
    ("output throughput in window (tok/s)", "window_output_throughput"),
    ("SLO violations (share)", "slo_violations"),
)
MEANS = (
    ("accuracy (%)", "accuracy", 100.0),
    ("mean TTFO (s)", "mean_ttfo_ms", 1e-3),
    ("P99 TTFO (s)", "p99_ttfo_ms", 1e-3),
    ("mean TTFT (s)", "mean_ttft_ms", 1e-3),
    ("P99 slowdown", "p99_slowdown", 1.0),
    ("mean TPOT (ms)", "mean_tpot_ms", 1.0),
    ("mean answer TPOT (ms)", "mean_answer_tpot_ms", 1.0),
    ("mean E2E latency (s)", "mean_e2e_latency_ms", 1e-3),
    ("mean QoE", "mean_qoe", 1.0),
    ("SLO violations (%)", "slo_violations", 100.0),
    ("output throughput (tok/s)", "output_throughput", 1.0),
    ("failed", "failed", 1.0),
    ("no answer", "no_answer", 1.0),
)
COUNTS = ("failed", "no_answer")
# Name, title, caption, and what is said where there is nothing to draw.
FIGURES = (
    (
        "load",
        "Time to the answer against load",
        "Means over seeds, on a logarithmic scale. Bars span the seeds. Points of one load stand"
        " side by side.",
        "No TTFO in the results.",
    ),
    (
        "cdf",
        "Distribution of the time to the answer",
        "Share of all requests whose answer had begun by then, seeds together, on a logarithmic"
        " scale. A curve that ends below 1 belongs to an arm with requests that never answered.",
        "No TTFO of single requests in the results: no distribution to draw.",
    ),
    (
        "bins",
        "Tail of the time to the answer by thinking length",
        "Mean over seeds of the tail in each bin, on a logarithmic scale. n counts the requests,"
        " seeds together.",
        "No answered request in any thinking-length bin: no tails to draw.",
    ),
    (
        "slowdown",
        "Slowdown",
        "TTFO over the TTFO of the same request alone on an idle server, on a logarithmic scale."
        " Bars span the seeds.",
        "TTFO alone on an idle server was not measured: no slowdown to draw.",
    ),
    (
        "rate",
        "Violations and throughput against load",
        "Means over seeds; bars span the seeds. The axes need not begin at 0.",
        "No throughput in the results: nothing to draw.",
    ),
    (
        "timeline",
        "A few requests",
        "First seed. From the arrival times of tokens at the client: queued is the time to"
        " the first token; paused and moved are what the server told of the request (ours do);"
        f" stalled is a gap of more than {STALL_FACTOR:g} times the median gap of the same request"
        " that nothing explains, such as a retraction by a stock server.",
        "No timelines of single requests in the results.",
    ),
)
ABSENT = {name: absent for name, _, _, absent in FIGURES}
NO_COUNTERS = (
    "No server showed a counter of pauses, migrations or retractions. SGLang shows those of its own"
    " after their first event only."
)
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "reporting"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    # Whether its cells may break into lines.
    wrap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    title: str
    caption: str
    panels: Sequence[str]
    legend: Sequence[str]
    wide: bool = False
    tables: Sequence[Table] = ()


def render(results: Results, title: str) -> str:
    """The whole page."""
    drawn = {
        "load": plots.ttfo_against_load(results),
        "cdf": plots.ttfo_cdf(results),
        "bins": plots.tail_by_bin(results),
        "slowdown": plots.slowdown(results),
        "rate": plots.violations_and_throughput(results),
        "timeline": plots.timelines(results),
    }
    bins = list(_bins(results))
    counters = list(_counters(results))
    absent = [ABSENT[name] for name, panels in drawn.items() if not panels]
    absent += [] if counters else [NO_COUNTERS]
    absent += [] if results.commands else ["The results name no commands."]
    absent += [] if results.versions else ["The results name no versions."]
    told = words.arms(results)
    samples = {name: _sample(look) for name, look in looks(results.arms).items()}
    return TEMPLATES.get_template("page.html.jinja").render(
        title=title,
        extent=[_extent(results), *results.about],
        notes=results.notes,
        conclusions=words.conclusions(results),
        arms=[
            {"name": name, "sample": sample, "words": told.get(name, "")}
            for name, sample in samples.items()
        ],
        terms=words.terms(results),
        verdicts=list(_verdicts(results)),
        figures=[
            Figure(
                name=name,
                title=heading,
                caption=caption,
                panels=[Markup(svg) for svg in drawn[name]],
                legend=_states() if name == "timeline" else _legend(samples),
                wide=name == "timeline",
                tables=bins if name == "bins" else (),
            )
            for name, heading, caption, _ in FIGURES
            if drawn[name] or (name == "bins" and bins)
        ],
        means=list(_per_load(results, _mean, MEANS)),
        every=list(_per_load(results, _range, _every_figure(), wrap=True)),
        counters=counters,
        commands=results.commands,
        versions=Table(head=("", "version"), rows=list(results.versions.items()))
        if results.versions
        else None,
        absent=absent,
    )


def write(paths: Sequence[Path], out: Path, title: str | None = None) -> None:
    """The page of result files. Raises ResultError for what cannot be read, OSError for `out`."""
    results = load(paths)
    out.write_text(
        render(
            results, title or ", ".join(Path(path.name.removesuffix(".gz")).stem for path in paths)
        )
    )


def _extent(results: Results) -> str:
    seeds = {run.seed for run in results.runs}
    counts: dict[str, Sized] = {
        **{"run": results.runs, "arm": results.arms, "load": results.loads, "seed": seeds}
    }
    return ", ".join(f"{len(c)} {word}{'s' * (len(c) != 1)}" for word, c in counts.items())


def _sample(look: Look) -> str:
    """A piece of the arm's line with its marker."""
    dashes = {"--": "5 3", ":": "2 2"}.get(look.line, "none")
    middle = {
        "s": '<rect x="11" y="3" width="6" height="6"/>',
        "D": '<path d="M14 2 L18 6 L14 10 L10 6 Z"/>',
        "^": '<path d="M14 2 L18 9 L10 9 Z"/>',
    }.get(look.marker, '<circle cx="14" cy="6" r="3"/>')
    return Markup(
        f'<svg width="28" height="12" aria-hidden="true" fill="{look.colour}"'
        f' stroke="{look.colour}"><path d="M0 6 L28 6" stroke-width="1.5"'
        f' stroke-dasharray="{dashes}"/>{middle}</svg>'
    )


def _legend(samples: dict[str, str]) -> list[str]:
    return [Markup("{}{}").format(sample, name) for name, sample in samples.items()]


def _states() -> list[str]:
    swatch = Markup('<i style="background:{}"></i>{}')
    return [swatch.format(colour, state) for state, colour in plots.STATE_COLOURS.items()]


def _verdicts(results: Results) -> Iterable[Table]:
    """A table per load: targets down, arms across."""
    for rate, by_arm in results.verdicts.items():
        lines = {arm: {t.name: t for t in targets} for arm, targets in by_arm.items()}
        names = dict.fromkeys(name for found in lines.values() for name in found)
        yield Table(
            title=plots.load_name(results, rate),
            head=["target", *lines],
            rows=[
                [name, *(_judged(found.get(name)) for found in lines.values())] for name in names
            ],
            wrap=True,
        )


def _judged(target: Target | None) -> str:
    if target is None:
        return ""
    word = {True: "pass", False: "FAIL", None: "not judged"}[target.passed]
    return Markup('<span class="{0}">{0}: {1}</span>').format(word, target.seen)


def _per_load(
    results: Results,
    cell: Callable[[Sequence[Shown], str, float], str],
    figures: Sequence[tuple[str, str, float]],
    *,
    wrap: bool = False,
) -> Iterable[Table]:
    """A table per load, figures down and arms across, without the figures that no run has."""
    known = [
        each for each in figures if any(_read(run, each[1]) is not None for run in results.runs)
    ]
    for rate, _ in results.loads:
        by_arm = {arm: runs for arm in results.arms if (runs := results.of(arm, rate))}
        yield Table(
            title=plots.load_name(results, rate),
            head=["", *by_arm],
            rows=[
                [label, *(cell(runs, key, unit) for runs in by_arm.values())]
                for label, key, unit in known
            ],
            wrap=wrap,
        )


def _read(run: Shown, key: str) -> float | None:
    value: float | None = run.lag_p99_ms if key == LAG else run.summary.get(key)
    return value


def _values(runs: Sequence[Shown], key: str, unit: float) -> list[float]:
    return [unit * v for run in runs if (v := _read(run, key)) is not None]


def _mean(runs: Sequence[Shown], key: str, unit: float) -> str:
    values = _values(runs, key, unit)
    if not values:
        return "n/a"
    mean = f"{sum(values) / len(values):.2f}"
    return mean.removesuffix(".00") if key in COUNTS else mean


def _range(runs: Sequence[Shown], key: str, unit: float) -> str:
    values = _values(runs, key, unit)
    if not values:
        return "n/a"
    low, high = _brief(min(values)), _brief(max(values))
    return low if low == high else f"{_brief(sum(values) / len(values))} ({low}..{high})"


def _every_figure() -> list[tuple[str, str, float]]:
    return [
        *((label, key, 1.0) for label, key in TOTALS),
        *((f"{stat} {label}", f"{key}_{name}", 1.0) for _, label, name in SECTIONS
          for stat, key in STATISTICS),
        ("P99 client lag (ms)", LAG, 1.0),
    ]  # fmt: skip


def _bins(results: Results) -> Iterable[Table]:
    """Per load and binning: tail TTFO and the sample count of every arm and bin."""
    for rate, _ in results.loads:
        counted = [r for r in results.runs if r.rate == rate and "bin_requests" in r.summary]
        for edges in dict.fromkeys(run.edges for run in counted):
            names = bin_names(edges)
            rows = []
            for arm in results.arms:
                runs = [run for run in results.of(arm, rate) if run.edges == edges]
                cells = [plots.bin_cell(runs, index) for index in range(len(names))]
                if runs:
                    rows.append([arm, *(f"{_number(value)} ({n})" for value, n in cells)])
            yield Table(
                title=f"{plots.load_name(results, rate)}: tail TTFO in seconds (requests)",
                head=["arm", *(f"{name} tokens" for name in names)],
                rows=rows,
            )


def _counters(results: Results) -> Iterable[Table]:
    """Per load: counters down, the arms that have any across."""
    for rate, _ in results.loads:
        sums: dict[str, dict[str, float]] = {}
        for arm in results.arms:
            for run in results.of(arm, rate):
                for name, change in totals(run.counters).items():
                    of_arm = sums.setdefault(arm, {})
                    of_arm[name] = of_arm.get(name, 0.0) + change
        names = dict.fromkeys(name for found in sums.values() for name in found)
        if names:
            yield Table(
                title=plots.load_name(results, rate),
                head=["counter", *sums],
                rows=[
                    [name, *(_number(found.get(name)) for found in sums.values())] for name in names
                ],
            )


def _brief(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _number(value: Any) -> str:
    if value is None:
        return "n/a"
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return f"{value:.0f}" if whole else f"{value:.3f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the results of any tool here as one HTML page."
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON or JSONL files")
    parser.add_argument("--out", type=Path, help="HTML file; the first result's name by default")
    parser.add_argument("--title", help="the result files' names by default")
    asked = parser.parse_args(argv)
    out = asked.out or asked.results[0].with_suffix(".html")
    try:
        write(asked.results, out, asked.title)
    except (ResultError, OSError) as error:
        print(f"evals: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
