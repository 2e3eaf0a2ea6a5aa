"""Console lines in the style of `sglang.benchmark.serving`, with the phases added."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 50

COUNTS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Requests without an answer:", "no_answer"),
    ("Benchmark duration (s):", "duration"),
    ("Arrival window (s):", "arrival_window"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Reasoning tokens:", "reasoning_tokens"),
    ("Answer tokens:", "answer_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Input token throughput (tok/s):", "input_throughput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Output throughput in window (tok/s):", "window_output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_throughput"),
    ("Concurrency:", "concurrency"),
)
SECTIONS = (
    ("End-to-End Latency", "E2E Latency (ms)", "e2e_latency_ms"),
    ("Time to First Token", "TTFT (ms)", "ttft_ms"),
    ("Time per Output Token (excl. 1st token)", "TPOT (ms)", "tpot_ms"),
    ("Inter-Token Latency", "ITL (ms)", "itl_ms"),
    ("Reasoning Time", "Reasoning Time (ms)", "reasoning_time_ms"),
    ("Time to First Output Token", "TTFO (ms)", "ttfo_ms"),
    ("TTFO over TTFO Alone", "Slowdown", "slowdown"),
    ("Time per Answer Token (excl. 1st token)", "Answer TPOT (ms)", "answer_tpot_ms"),
    ("Inter-Token Latency of Answers", "Answer ITL (ms)", "answer_itl_ms"),
    ("Quality of Experience", "QoE", "qoe"),
)
STATISTICS = (
    ("Mean", "mean"),
    ("Median", "median"),
    ("P90", "p90"),
    ("P95", "p95"),
    ("P99", "p99"),
    ("Max", "max"),
)


def line(label: str, value: Any) -> str:
    """One line: the label 40 wide, whole numbers as they are, others with two decimals."""
    shown = "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {shown:<10}".rstrip()


def lines(
    summary: Mapping[str, Any],
    title: str,
    edges: Sequence[float],
    *,
    head: Sequence[tuple[str, Any]] = (),
    counters: Mapping[str, float] | None = None,
) -> list[str]:
    """The full report of one run.

    edges: the bins' inner edges in thinking tokens. head: labels and values above the rest.
    counters: how far the server's own counters moved during the run.
    """
    out = [f"{f' {title} ':=^{WIDTH}}", *itertools.starmap(line, head)]
    out += [line(label, summary[key]) for label, key in COUNTS if key in summary]
    out.append(line("SLO violations (%):", 100 * summary["slo_violations"]))
    for name, share in summary.get("slo_attainment_by_metric", {}).items():
        out.append(line(f"{name.upper()} SLO attainment (%):", 100 * share))
    for heading, label, key in SECTIONS:
        out.append(f"{heading:-^{WIDTH}}")
        out += [line(f"{name} {label}:", summary[f"{stat}_{key}"]) for name, stat in STATISTICS]
    out.append(f"{'Tail TTFO by Thinking Length':-^{WIDTH}}")
    cells = zip(bin_names(edges), summary["bin_requests"], summary["tail_ttfo_by_bin"], strict=True)
    for name, count, tail_s in cells:
        label = f"{name} tokens, {count} requests (ms):"
        out.append(line(label, None if tail_s is None else tail_s * 1e3))
    if counters:
        out.append(f"{'Server Counters (change)':-^{WIDTH}}")
        out += [line(f"{name}:", round(change)) for name, change in totals(counters).items()]
    # With details there is one for every request, empty where all went well.
    out += [f"error: {error}" for error in dict.fromkeys(filter(None, summary["errors"]))]
    return [*out, "=" * WIDTH]


def totals(counters: Mapping[str, float]) -> dict[str, float]:
    """The counters proper: sums and counts of the server's histograms repeat what we measure."""
    return {name: value for name, value in counters.items() if "_total" in name}


def migrations(counters: Mapping[str, float]) -> float:
    """Requests that went on at another instance."""
    ends = ((name, n) for name, n in counters.items() if name.startswith("pascal:migrations_total"))
    return sum(n for name, n in ends if 'outcome="moved"' in name)


def short(summary: Mapping[str, Any]) -> str:
    """One run in one line."""

    def seconds(key: str) -> str:
        value = summary[key]
        return "n/a" if value is None else f"{value / 1e3:.2f}"

    slow = summary["p99_slowdown"]
    return (
        f"TTFO mean {seconds('mean_ttfo_ms')} p99 {seconds('p99_ttfo_ms')} s, "
        f"p99 slowdown {'n/a' if slow is None else f'{slow:.1f}'}, "
        f"answer TPOT {summary['mean_answer_tpot_ms'] or 0.0:.1f} ms, "
        f"violations {100 * summary['slo_violations']:.1f} %, "
        f"{summary['output_throughput']:.0f} tok/s, {summary['duration']:.1f} s, "
        f"failed {summary['failed']}, no answer {summary['no_answer']}"
    )


def bin_names(edges: Sequence[float]) -> list[str]:
    """Names of thinking-length bins: the upper edge belongs to the bin."""
    if not edges:
        return ["all"]
    pairs = itertools.pairwise(edges)
    return [f"<={edges[0]:.0f}", *(f"{a:.0f}-{b:.0f}" for a, b in pairs), f">{edges[-1]:.0f}"]
