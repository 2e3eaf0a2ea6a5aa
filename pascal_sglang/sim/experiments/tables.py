"""Figures of many runs as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pascal_sglang.sim.figures import STEADY_TIMES, bin_names

Rows = Sequence[dict[str, Any]]


def pick(rows: Rows, **wanted: object) -> list[dict[str, Any]]:
    """The runs that are what is wanted."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean(rows: Rows, key: str) -> float | None:
    """Over runs that have the figure."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def names(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def bin_tails(rows: Rows) -> list[tuple[float | None, int]]:
    """Per bin the mean over runs of the tail TTFO (s), and the requests of all runs in it."""
    found: list[tuple[float | None, int]] = []
    for index in range(len(bin_names())):
        tails = [t for row in rows if (t := row["tail_ttfo_by_bin"][index]) is not None]
        count = sum(row["bin_requests"][index] for row in rows)
        found.append((sum(tails) / len(tails) if tails else None, count))
    return found


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def lay_out(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them: the first to the left, the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def arms_table(rows: Rows) -> list[str]:
    """A line per arm of one load: means over seeds. worst bin: the tail slowdown of the
    thinking-length bin where it is highest, and the bin of the worst seed. big prompts: mean
    slowdown of the tenth with the longest prompts."""
    head = (
        "arm", "TTFO mean", "P99", "slowdown P99", "worst bin", "", "big prompts", "SLO viol %",
        "blocking P99", "answer TPOT", "e2e mean", "P50", "P99", "tok/s", "tok/busy s", "pauses",
        "moves", "transfer P99",
    )  # fmt: skip
    lines = []
    for arm in names(rows, "arm"):
        mine = pick(rows, arm=arm)
        violations = mean(mine, "slo_violations")
        lines.append(
            (
                arm,
                shown(mean(mine, "mean_ttfo")),
                shown(mean(mine, "p99_ttfo")),
                shown(mean(mine, "p99_slowdown")),
                *worst_bin(mine),
                shown(mean(mine, "mean_slowdown_big_prompts")),
                shown(None if violations is None else 100 * violations),
                shown(mean(mine, "p99_blocking")),
                shown(mean(mine, "mean_answer_tpot"), 3),
                shown(mean(mine, "mean_e2e"), 1),
                shown(mean(mine, "median_e2e"), 1),
                shown(mean(mine, "p99_e2e"), 1),
                shown(mean(mine, "throughput"), 0),
                shown(mean(mine, "efficiency"), 0),
                shown(mean(mine, "pauses"), 0),
                shown(mean(mine, "moved"), 0),
                shown(mean(mine, "p99_transfer"), 3),
            )
        )
    return lay_out(head, lines)


def worst_bin(rows: Rows) -> tuple[str, str]:
    """Of runs of one arm: the mean over seeds, and where the worst seed has it."""
    known = [row for row in rows if row["worst_bin"] is not None]
    if not known:
        return "-", ""
    worst = max(known, key=lambda row: float(row["worst_bin_slowdown"]))
    return shown(mean(known, "worst_bin_slowdown")), worst["worst_bin"]


def steadiness(rows: Rows) -> str:
    """Whether the runs of one load are steady, by the arm and seed with the longest P99."""
    times = min(row["steadiness"] for row in rows)
    word = "steady" if times >= STEADY_TIMES else "a ramp"
    return f"{word}: arrivals last {times:.1f} P99 end-to-end times"


def bins_table(rows: Rows) -> list[str]:
    """Tail TTFO (s) per thinking-length bin, a line per arm, with the requests behind each."""
    arms = names(rows, "arm")
    counts = [str(count) for _, count in bin_tails(pick(rows, arm=arms[0]))]
    lines = [("requests", *counts)]
    for arm in arms:
        lines.append((arm, *(shown(value, 1) for value, _ in bin_tails(pick(rows, arm=arm)))))
    return lay_out(("tail TTFO (s)", *bin_names()), lines)


def tenants_table(rows: Rows) -> list[str]:
    """A line per arm: Jain's index (`sim.tenants`), and the TTFO (s) of each tenant."""
    counts = rows[0]["requests_by_tenant"]
    head = ["tenants", "Jain's index"]
    for number, count in enumerate(counts):
        head += [f"{number}: requests {count}, TTFO mean", "P99"]
    lines = []
    for arm in names(rows, "arm"):
        mine = pick(rows, arm=arm)
        line = [arm, shown(mean(mine, "jain"), 3)]
        for number in range(len(counts)):
            for key in ("ttfo_by_tenant", "p99_ttfo_by_tenant"):
                line.append(shown(sum(row[key][number] for row in mine) / len(mine)))
        lines.append(line)
    return lay_out(head, lines)


def report(rows: Rows) -> list[str]:
    """Both tables of every source and load."""
    lines: list[str] = []
    for source in names(rows, "source"):
        for load in names(pick(rows, source=source), "load"):
            mine = pick(rows, source=source, load=load)
            rate, seeds = mine[0]["rate"], len(names(mine, "seed"))
            lines += [
                "",
                f"== {source}, {load}: {rate:.2f} requests/s, {mine[0]['requests']} requests, "
                f"{seeds} seed{'s' if seeds > 1 else ''} (seconds); {steadiness(mine)}",
                *arms_table(mine),
                "",
                *bins_table(mine),
            ]
            if "jain" in mine[0]:
                lines += ["", *tenants_table(mine)]
    return lines
