"""Accuracy beside what a reader feels: the figures of one arm, and one table over all arms.

The interval of an accuracy is Wilson's score interval for a binomial share at 95 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest
from tabulate import tabulate

from evals.grading.chat import TIMEOUT
from evals.grading.grades import Grade, Task
from evals.grading.reply import Heard
from evals.reporting.metrics import measure, summarize
from evals.reporting.report import WIDTH, line
from evals.workload import Item

OUTCOMES = ("correct", "wrong", "no_answer", "timeout", "error")
INTERRUPTED = "interrupted"

ROWS = (
    ("Questions:", "questions", 1),
    ("Correct:", "correct", 1),
    ("Wrong:", "wrong", 1),
    ("Without an answer:", "no_answer", 1),
    ("Time-outs:", "timeout", 1),
    ("Errors:", "error", 1),
    ("Interrupted:", "interrupted", 1),
    ("Accuracy (%):", "accuracy", 100),
    ("Accuracy, 95 % from (%):", "accuracy_low", 100),
    ("Accuracy, 95 % to (%):", "accuracy_high", 100),
    ("Mean TTFT (ms):", "mean_ttft_ms", 1),
    ("Mean TTFO (ms):", "mean_ttfo_ms", 1),
    ("P99 TTFO (ms):", "p99_ttfo_ms", 1),
    ("Mean QoE:", "mean_qoe", 1),
    ("SLO violations (%):", "slo_violations", 100),
    ("Output token throughput (tok/s):", "output_throughput", 1),
    ("Duration (s):", "duration", 1),
)


@dataclass(frozen=True, slots=True)
class Graded:
    """A question, what came back, and its grade; None where there was nothing to grade."""

    task: Task
    heard: Heard
    grade: Grade | None

    @property
    def outcome(self) -> str:
        """One of OUTCOMES, or INTERRUPTED by Ctrl-C, which says nothing of the model."""
        error = self.heard.record.error
        if self.heard.cut:
            return INTERRUPTED
        if error is not None:
            return "timeout" if error == TIMEOUT else "error"
        if not answered(self.heard):
            return "no_answer"
        if self.grade is None:
            return INTERRUPTED
        return "correct" if self.grade.correct else "wrong"


def answered(heard: Heard) -> bool:
    """Whether there is a whole answer to grade."""
    return heard.record.finished and bool(heard.answer.strip())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Bounds of a binomial share at 95 %; of no trials, everything is possible."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def figures(items: Sequence[Graded], target_tpot_s: float) -> dict[str, Any]:
    """Counts by outcome, accuracy over all that were not interrupted, and the figures of
    `evals.reporting.metrics.summarize` under its names."""
    counts = Counter(item.outcome for item in items)
    whole = [item for item in items if item.outcome != INTERRUPTED]
    low, high = wilson(counts["correct"], len(whole))
    summary = _summary(whole, target_tpot_s) if whole else {}
    return {
        **summary,
        "questions": len(whole),
        **{name: counts[name] for name in (*OUTCOMES, INTERRUPTED)},
        "accuracy": counts["correct"] / len(whole) if whole else None,
        "accuracy_low": low,
        "accuracy_high": high,
    }


def _summary(items: Sequence[Graded], target_tpot_s: float) -> dict[str, Any]:
    records = [item.heard.record for item in items]
    asked = [_as_heard(item.heard) for item in items]
    summary = summarize(records, asked, idle=None, target_tpot_s=target_tpot_s, edges=[])
    # One bin of everything, and no time alone to compare with.
    return {k: v for k, v in summary.items() if "bin" not in k and "slowdown" not in k}


def _as_heard(heard: Heard) -> Item:
    """The model itself said how long it thinks and answers."""
    record = heard.record
    return Item(
        arrival_s=record.arrival_s,
        prompt_tokens=max(1, heard.prompt_tokens or 0),
        thinking_tokens=record.reasoning_tokens,
        answer_tokens=max(1, len(record.answer_s)),
    )


def entry(item: Graded, target_tpot_s: float) -> dict[str, Any]:
    """One question in the result file."""
    heard, grade = item.heard, item.grade
    seen = measure(heard.record, _as_heard(heard), None, target_tpot_s)
    return {
        "name": item.task.name,
        "outcome": item.outcome,
        "found": grade.found if grade else None,
        "note": grade.note if grade else "",
        "error": heard.record.error,
        "finish_reason": heard.finish_reason,
        "answer": heard.answer,
        "thinking_characters": len(heard.thinking),
        "reasoning_tokens": heard.reasoning_tokens,
        "completion_tokens": heard.completion_tokens,
        "ttft_ms": _ms(seen.ttft_s),
        "ttfo_ms": _ms(seen.ttfo_s),
        "e2e_latency_ms": _ms(seen.e2e_s),
        "qoe": seen.qoe,
    }


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3


def table(title: str, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures of every arm side by side; an arm's name heads its column."""
    rows = [
        [label, *(_cell(figures.get(key), factor) for figures in arms.values())]
        for label, key, factor in ROWS
    ]
    body = tabulate(rows, headers=["", *arms], tablefmt="plain", disable_numparse=True)
    return [f"{f' {title} ':=^{WIDTH}}", *body.splitlines(), "=" * WIDTH]


def _cell(value: float | None, factor: int) -> str:
    return line("", value if value is None or factor == 1 else factor * value).strip()
