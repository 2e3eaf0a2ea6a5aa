"""The check's own figures, as numbers and as lines of its table. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.gpu.identity import Identity
    from evals.gpu.moves import Row
    from evals.reporting.verdict import Run

Figures = dict[str, float | None]
STEPS = {
    "mean_tpot_ms": "a step, ms",
    "output_throughput": "throughput, tokens/s",
}


def identity_lines(found: Identity) -> list[str]:
    pauses = ", ".join(f"{count} {tier}" for tier, count in found.pauses.items())
    migrations = ", ".join(f"{count} {outcome}" for outcome, count in found.migrations.items())
    return [
        _line("requests with other tokens", f"{len(found.different)} of {found.requests}"),
        _line("with other tokens on SGLang alone", str(len(found.unsteady))),
        _line("tokens compared", str(found.tokens)),
        _line("ended by a stop token, aborted", f"{found.stopped}, {found.aborted}"),
        _line("pauses forced", pauses),
        _line("moves forced", migrations or "none"),
        _line("passes that failed, KV that stayed behind", f"{found.errors}, {found.left}"),
        _line("token identity", "holds" if found.holds else "DOES NOT HOLD"),
    ]


def overhead(run: Run, instances: Sequence[Mapping[str, Any]]) -> Figures:
    """What scheduling cost in a run, per pass and as a share of one scheduler's time, and what KV
    copies cost: as measured at start, and of the run's pauses by that measure, per pass.

    instances: what `GET /pascal/status` said after it.
    """
    passes = run.counters.get("pascal:policy_passes_total", 0.0)
    seconds = run.counters.get("pascal:policy_seconds_total", 0.0)
    duration = float(run.summary["duration"]) * max(1, len(instances))
    costs = [instance["costs"] for instance in instances]
    copies = [
        instance["pauses"].get("host", 0) * cost["copy_s"]
        + instance["pauses"].get("host_tokens", 0) * cost["copy_token_s"]
        for instance, cost in zip(instances, costs, strict=True)
    ]
    prefills = [c["prefill_token_s"] for c in costs if c["prefill_token_s"] is not None]
    return {
        "passes": passes,
        "policy_us_per_pass": 1e6 * seconds / passes if passes else None,
        "policy_share": seconds / duration if duration else None,
        "copy_us": 1e6 * max(c["copy_s"] for c in costs) if costs else None,
        "copy_us_per_token": 1e6 * max(c["copy_token_s"] for c in costs) if costs else None,
        "prefill_us_per_token": 1e6 * max(prefills) if prefills else None,
        "host_pauses": float(sum(i["pauses"].get("host", 0) for i in instances)),
        "copy_us_per_pass": 1e6 * sum(copies) / passes if passes else None,
    }


def overhead_lines(found: Mapping[str, Figures]) -> list[str]:
    names = {
        "policy_us_per_pass": "policy, us a pass",
        "policy_share": "policy, share of the scheduler's time",
        "copy_us": "a copy of KV, us",
        "copy_us_per_token": "and a token of it, us",
        "prefill_us_per_token": "a token of prefill, us",
        "host_pauses": "pauses to host memory",
        "copy_us_per_pass": "copies to the host, us a pass",
    }
    lines = []
    for arm, values in found.items():
        lines.append(f"what {arm} cost:")
        for key, name in names.items():
            value = values[key]
            lines.append(_line(f"  {name}", "-" if value is None else f"{value:.4g}"))
    return lines


def steps(runs: Sequence[Run]) -> dict[str, Figures]:
    """Per arm, over its runs: time between two tokens of a request, and throughput."""
    found: dict[str, Figures] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        summaries = [run.summary for run in runs if run.arm == arm]
        found[arm] = {
            key: sum(values) / len(values) if values else None
            for key in STEPS
            for values in [[s[key] for s in summaries if s.get(key) is not None]]
        }
    return found


def step_lines(found: Mapping[str, Figures]) -> list[str]:
    """Each arm, and how many times the first one's figure its own is."""
    lines = []
    for key, name in STEPS.items():
        first = next(iter(found.values()), {}).get(key)
        for arm, values in found.items():
            value = values[key]
            ratio = f", {value / first:.3f} x" if value is not None and first else ""
            lines.append(_line(f"{name}, {arm}", "-" if value is None else f"{value:.4g}{ratio}"))
    return lines


def probe_line(line: str) -> dict[str, Any] | None:
    """What a line of the probe's output tells; None if it is none of its own."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and {"name", "holds", "value"} <= set(told) else None


def probe_text(told: Mapping[str, Any]) -> str:
    """A finding of the probe as a line: whether something holds, or how much something is."""
    holds, value = told["holds"], told["value"]
    if holds is not None:
        shown = "holds" if holds else "DOES NOT HOLD"
        return _line(told["name"], f"{shown}{f', {value}' if value else ''}")
    return _line(told["name"], "-" if value is None else f"{value:.4g}")


def moves_head() -> str:
    columns = ("moves", "MiB each", "p50 ms", "max ms", "step ms", "steps")
    return f"{'tokens':<8}" + "".join(f"{column:>10}" for column in columns)


def moves_line(row: Row) -> str:
    median, longest = row.blocked_ms
    figures = (row.mib, median, longest, row.step_ms, row.steps)
    others = "".join(f", {count} {outcome}" for outcome, count in row.others.items())
    shown = "".join(f"{value:>10.1f}" for value in figures)
    return f"{row.prompt_tokens:<8}{row.moves:>10}{shown}{others}"


def _line(name: str, value: str) -> str:
    return f"{name + ': ':<44}{value}"
