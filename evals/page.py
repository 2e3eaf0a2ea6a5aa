"""A self-contained HTML page of results: no script, no network, one file.

`python -m evals.page result.json [more.jsonl ...] --out page.html` reads what any tool here wrote.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

from evals.load.timeline import STALL_FACTOR
from evals.reporting import plots
from evals.reporting.report import SECTIONS, STATISTICS, bin_names, totals
from evals.reporting.result_files import load
from evals.reporting.results import ResultError, Results, Shown
from evals.reporting.verdict import Target

EXIT_BAD_INPUT = 2
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { max-width: 100%; height: auto; }
figure { margin: 0 0 1rem; } figcaption, .absent { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .55rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
pre { background: #f5f5f5; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.FAIL { color: #b00020; font-weight: 600; } .pass { color: #1a7f37; } .note { color: #b00020; }
summary { cursor: pointer; color: #555; }
"""
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
CAPTIONS = {
    "cdf": "Share of all requests whose answer had begun by then, seeds together. A curve that ends"
    " below 1 belongs to an arm with requests that never answered.",
    "bins": "Mean over seeds of the tail in each bin (the maximum below 10 requests in a run, then"
    " P90, P95 from 30, P99 from 100). n counts the requests, seeds together.",
    "slowdown": "TTFO over the TTFO of the same request alone on an idle server, on a logarithmic"
    " scale. Bars span the seeds.",
    "rate": "QoE SLO attainment is the share of requests that finished with a QoE of at least 0.95."
    " Goodput counts the requests that met every objective of --goodput. Bars span the seeds.",
    "timeline": "First seed. From the arrival times of tokens at the client: queued is the time to"
    " the first token; paused and moved are what the server told of the request (ours do);"
    f" stalled is a gap of more than {STALL_FACTOR:g} times the median gap of the same request that"
    " nobody explains, such as a retraction by a stock server.",
}
ABSENT = {
    "cdf": "No TTFO of single requests in the results: no distribution to draw.",
    "bins": "No answered request in any thinking-length bin: no tails to draw.",
    "slowdown": "TTFO alone on an idle server was not measured: no slowdown to draw.",
    "rate": "No throughput in the results: nothing to draw.",
    "timeline": "No timelines of single requests in the results.",
}


def render(results: Results, title: str) -> str:
    """The whole page."""
    parts = [
        f"<h1>{_text(title)}</h1>",
        *(f"<p>{_text(line)}</p>" for line in (_extent(results), *results.about)),
        *(f'<p class="note">{_text(note)}</p>' for note in results.notes),
        *_verdicts(results),
        "<h2>Means over seeds</h2>",
        _means_table(results),
        "<h2>Time to first output token</h2>",
        _figure("cdf", [plots.ttfo_cdf(results)]),
        "<h2>Tail TTFO by thinking length</h2>",
        _figure("bins", [plots.tail_by_bin(results)]),
        *_bin_tables(results),
        "<h2>Slowdown</h2>",
        _figure("slowdown", [plots.slowdown(results)]),
        "<h2>SLO attainment and throughput against load</h2>",
        _figure("rate", [plots.attainment_and_throughput(results)]),
        "<h2>A few requests</h2>",
        _figure("timeline", [plots.timelines(results, rate) for rate, _ in results.loads]),
        "<h2>All figures</h2>",
        f"<details><summary>Every run a row</summary>{_figures_table(results)}</details>",
        *_counters(results),
        "<h2>Commands</h2>",
        *(f"<h3>{_text(k)}</h3><pre>{_text(v)}</pre>" for k, v in results.commands.items()),
        *([] if results.commands else ['<p class="absent">The results name no commands.</p>']),
        "<h2>Versions</h2>",
        _table(["", "version"], [[name, told] for name, told in results.versions.items()])
        if results.versions
        else '<p class="absent">The results name no versions.</p>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def write(paths: Sequence[Path], out: Path, title: str | None = None) -> None:
    """The page of result files. Raises ResultError for what cannot be read, OSError for `out`."""
    results = load(paths)
    out.write_text(render(results, title or ", ".join(path.stem for path in paths)))


def _extent(results: Results) -> str:
    counts: dict[str, Sized] = {"run": results.runs, "arm": results.arms, "load": results.loads}
    return ", ".join(f"{len(c)} {word}{'s' * (len(c) != 1)}" for word, c in counts.items())


def _verdicts(results: Results) -> Iterable[str]:
    """A table per load: targets down, arms across."""
    if results.verdicts:
        yield "<h2>Verdict</h2><p>Ratios to the best stock arm of each figure, or to the arm that "
        yield "a target names, with their range over seeds.</p>"
    for rate, by_arm in results.verdicts.items():
        lines = {arm: {t.name: t for t in targets} for arm, targets in by_arm.items()}
        names = dict.fromkeys(name for found in lines.values() for name in found)
        rows = [
            [_text(name), *(_judged(found.get(name)) for found in lines.values())] for name in names
        ]
        yield f"<h3>{_text(plots.load_name(results, rate))}</h3>"
        yield _table(["target", *lines], rows, safe=True)


def _judged(target: Target | None) -> str:
    if target is None:
        return ""
    word = {True: "pass", False: "FAIL", None: "not judged"}[target.passed]
    return f'<span class="{word}">{word}: {_text(target.seen)}</span>'


def _means_table(results: Results) -> str:
    """Without the figures that no run has."""
    means = [mean for mean in MEANS if any(mean[1] in run.summary for run in results.runs)]
    rows = []
    for rate, _ in results.loads:
        for arm in results.arms:
            runs = results.of(arm, rate)
            if runs:
                cells = [_mean(runs, key, unit) for _, key, unit in means]
                rows.append([f"{plots.load_name(results, rate)}: {arm}", *cells])
    return _table(["load: arm", *(label for label, _, _ in means)], rows)


def _mean(runs: Sequence[Shown], key: str, unit: float) -> str:
    values = [v for run in runs if (v := run.summary.get(key)) is not None]
    return f"{unit * sum(values) / len(values):.2f}" if values else "n/a"


def _figure(name: str, drawn: Sequence[str | None]) -> str:
    shown = [svg for svg in drawn if svg is not None]
    if not shown:
        return f'<p class="absent">{ABSENT[name]}</p>'
    caption = f"<figcaption>{_text(CAPTIONS[name])}</figcaption>"
    return f'<figure id="{name}">{"".join(shown)}{caption}</figure>'


def _bin_tables(results: Results) -> Iterable[str]:
    """Per load and binning: tail TTFO in seconds and the sample count of every arm and bin."""
    for rate, _ in results.loads:
        for edges in dict.fromkeys(run.edges for run in results.runs if run.rate == rate):
            names = bin_names(edges)
            rows = []
            for arm in results.arms:
                runs = [run for run in results.of(arm, rate) if run.edges == edges]
                cells = [plots.bin_cell(runs, index) for index in range(len(names))]
                if runs:
                    rows.append([arm, *(f"{_number(value)} ({n})" for value, n in cells)])
            load = _text(plots.load_name(results, rate))
            yield f"<h3>{load}: tail TTFO in seconds (requests)</h3>"
            yield _table(["arm", *(f"{name} tokens" for name in names)], rows)


def _figures_table(results: Results) -> str:
    """Every run a row, every figure a column."""
    keys = [
        *TOTALS,
        *((f"{stat} {label}", f"{key}_{name}") for _, label, name in SECTIONS
          for stat, key in STATISTICS),
    ]  # fmt: skip
    known = [(label, key) for label, key in keys if any(key in r.summary for r in results.runs)]
    lags = any(run.lag_p99_ms is not None for run in results.runs)
    rows = [
        [
            f"{run.arm}, {run.rate}, seed {run.seed}",
            *(_number(run.summary.get(key)) for _, key in known),
            *([_number(run.lag_p99_ms)] if lags else []),
        ]
        for run in results.runs
    ]
    lag = ["P99 client lag (ms)"] if lags else []
    return _table(["run", *(label for label, _ in known), *lag], rows)


def _counters(results: Results) -> Iterable[str]:
    yield "<h2>Server counters, change during the run</h2>"
    names = list(dict.fromkeys(name for run in results.runs for name in totals(run.counters)))
    if not names:
        yield (
            '<p class="absent">No server showed a counter of pauses, moves or retractions. SGLang '
            "shows those of its own after their first event only.</p>"
        )
        return
    rows = [
        [f"{r.arm}, {r.rate}, seed {r.seed}", *(_number(r.counters.get(n)) for n in names)]
        for r in results.runs
    ]
    yield _table(["run", *names], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, safe: bool = False) -> str:
    """`safe`: the cells are HTML already."""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{c if safe else _text(c)}</td>" for c in row) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _number(value: Any) -> str:
    if value is None:
        return "n/a"
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return f"{value:.0f}" if whole else f"{value:.3f}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))


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
