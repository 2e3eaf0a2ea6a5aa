"""Console lines in the style of `sglang.benchmark.serving`, with the phases added."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
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
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Output throughput in window (tok/s):", "window_output_throughput"),
)
SECTIONS = (
    ("End-to-End Latency", "E2E Latency (ms)", "e2e_latency_ms"),
    ("Time to First Token", "TTFT (ms)", "ttft_ms"),
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


def lines(summary: Mapping[str, Any], title: str, edges: list[float]) -> list[str]:
    """The full report of one run; `edges` are the bins' inner edges in thinking tokens."""
    out = [f"{f' {title} ':=^{WIDTH}}"]
    out += [line(label, summary[key]) for label, key in COUNTS if key in summary]
    out.append(line("SLO violations (%):", 100 * summary["slo_violations"]))
    for heading, label, key in SECTIONS:
        out.append(f"{heading:-^{WIDTH}}")
        out += [line(f"{name} {label}:", summary[f"{stat}_{key}"]) for name, stat in STATISTICS]
    out.append(f"{'Tail TTFO by Thinking Length':-^{WIDTH}}")
    cells = zip(bin_names(edges), summary["bin_requests"], summary["tail_ttfo_by_bin"], strict=True)
    for name, count, tail_s in cells:
        label = f"{name} tokens, {count} requests (ms):"
        out.append(line(label, None if tail_s is None else tail_s * 1e3))
    out += [f"error: {error}" for error in summary["errors"]]
    return [*out, "=" * WIDTH]


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


def bin_names(edges: list[float]) -> list[str]:
    """Names of thinking-length bins: the upper edge belongs to the bin."""
    if not edges:
        return ["all"]
    pairs = itertools.pairwise(edges)
    return [f"<={edges[0]:.0f}", *(f"{a:.0f}-{b:.0f}" for a, b in pairs), f">{edges[-1]:.0f}"]
