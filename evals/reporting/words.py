"""What a page says in words: which arm is what, what its terms mean, and what came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.reporting.plots import load_name
from evals.reporting.results import Results
from evals.reporting.verdict import Run, best, mean, ratio

POLICIES = {
    "pascal": "thinking first, answers kept on their reader's pace",
    "paper": "the order of the PASCAL paper to the letter",
    "rr": "round robin by the quanta of the whole request, whatever its phase",
    "rr-restart": "round robin whose count restarts at the end of the thinking",
    "fcfs": "first come, first served; SGLang's own order",
}
ROLES = {
    "stock": "SGLang as it is",
    "candidate": "SGLang with pascal_sglang",
    "oracle": "SGLang as it is, with KV memory to spare: what is left without memory pressure",
}
# Each with the start of the figures' keys that it explains; "" for those of every page.
TERMS = (
    ("TTFO", "ttfo", "time to first output: from a request's arrival to its first answering token"),
    ("TTFT", "ttft", "time to first token of any kind, thinking included"),
    ("TPOT", "tpot", "time per output token after the first; answer TPOT counts the answer alone"),
    ("E2E latency", "e2e", "from a request's arrival to its last token"),
    ("slowdown", "slowdown", "TTFO over the TTFO of the same request alone on an idle server"),
    (
        "tail",
        "tail_ttfo",
        "P99 of a run's requests where it has 100 or more, P95 from 30, P90 from 10, else the"
        " greatest",
    ),
    (
        "QoE",
        "qoe",
        "quality of experience: 1 where a reader, at their pace, never waits for the answer's next"
        " token; 0 at worst",
    ),
    (
        "SLO violation",
        "slo_violations",
        "a request whose QoE is below the objective, or that failed or did not answer",
    ),
    (
        "goodput",
        "request_goodput",
        "requests per second that met every objective of the run (--goodput)",
    ),
    ("seed", "", "one draw of the load; every arm gets the same ones"),
)


def arm(plan: Mapping[str, Any]) -> str:
    """An arm of a comparison's plan, as its JSON has it."""
    flags = list(plan["flags"])
    words = ROLES.get(plan["role"], plan["role"])
    if "--pascal-policy" in flags[:-1]:
        at = flags.index("--pascal-policy")
        policy = flags[at + 1]
        del flags[at : at + 2]
        words += f", policy {policy}"
        if policy in POLICIES:
            words += f" ({POLICIES[policy]})"
    return " ".join([words + (";" if flags else ""), *flags])


def arms(results: Results) -> dict[str, str]:
    """What each arm is, as far as the results or its name tell."""
    found = {}
    for name in results.arms:
        words = results.arm_words.get(name) or POLICIES.get(name)
        if words:
            found[name] = words
    return found


def terms(results: Results) -> list[tuple[str, str]]:
    """Those that the results have figures of."""
    keys = {key for run in results.runs for key in run.summary}
    return [(term, text) for term, part, text in TERMS if any(part in key for key in keys)]


def conclusions(results: Results) -> list[str]:
    """A sentence or two per load, and what was missed."""
    if results.conclusions:
        return results.conclusions
    runs = [Run(r.arm, r.rate, r.seed, dict(r.summary)) for r in results.runs]
    lines = [
        f"{load_name(results, rate)}: {' '.join(sentences)}"
        for rate, _ in results.loads
        if (sentences := list(_load(results, runs, rate)))
    ]
    missed = [
        f"{arm} at {load_name(results, rate)} ({target.name}: {target.seen})"
        for rate, by_arm in results.verdicts.items()
        for arm, targets in by_arm.items()
        for target in targets
        if target.passed is False
    ]
    if results.verdicts:
        lines.append(f"Missed targets: {'; '.join(missed)}." if missed else "Every target was met.")
    if len({run.seed for run in results.runs}) == 1:
        lines.append("One seed: the figures say nothing of their spread.")
    return lines


def _load(results: Results, runs: Sequence[Run], rate: str) -> Iterable[str]:
    """The answers' begin, violations, throughput."""
    roles: dict[str, list[str]] = {}
    for name in results.arms:
        if results.of(name, rate):
            roles.setdefault(results.roles.get(name, ""), []).append(name)
    candidates = roles.get("candidate", []) + roles.get("", [])

    def ttfo(summary: Mapping[str, Any]) -> float | None:
        value: float | None = summary.get("mean_ttfo_ms")
        return value

    means = {n: m for n in candidates if (m := mean(runs, n, rate, ttfo)) is not None}
    if not means:
        return
    base = best(runs, roles.get("stock", []), rate, ttfo)
    bottom = None if base is None else mean(runs, base, rate, ttfo)
    told = [
        f"{name} {_seconds(means[name])}{_times(runs, name, base, rate, ttfo)}"
        for name in sorted(means, key=means.__getitem__)
    ]
    beside = "" if bottom is None else f" against {base}, the best stock arm, {_seconds(bottom)}"
    yield f"mean TTFO{beside}: {', '.join(told)}."
    for name in roles.get("oracle", []):
        if (bound := mean(runs, name, rate, ttfo)) is not None:
            yield f"With memory to spare ({name}): {_seconds(bound)}."
    yield from _shares(results, runs, rate)
    yield from _throughput(runs, rate, list(means), roles.get("stock", []))


def _times(runs: Sequence[Run], arm: str, base: str | None, rate: str, read: Any) -> str:
    spread = ratio(runs, arm, base, rate, read)
    return "" if spread is None else f" ({spread.point:.2f}x)"


def _shares(results: Results, runs: Sequence[Run], rate: str) -> Iterable[str]:
    shares = {
        name: 100 * share
        for name in results.arms
        if (share := mean(runs, name, rate, lambda s: s.get("slo_violations"))) is not None
    }
    if shares and not any(shares.values()):
        yield "No SLO violations."
    elif shares:
        told = ", ".join(f"{name} {share:.1f} %" for name, share in shares.items() if share)
        rest = " The others: none." if not all(shares.values()) else ""
        yield f"SLO violations: {told}.{rest}"


def _throughput(
    runs: Sequence[Run], rate: str, arms: Sequence[str], stock: Sequence[str]
) -> Iterable[str]:
    """Beside the best stock arm's."""

    def read(summary: Mapping[str, Any]) -> float | None:
        value: float | None = summary.get("output_throughput")
        return value

    base = best(runs, stock, rate, read, higher=True)
    points = [s.point for arm in arms if (s := ratio(runs, arm, base, rate, read)) is not None]
    if points:
        low, high = f"{min(points):.2f}", f"{max(points):.2f}"
        span = low if low == high else f"{low} to {high}"
        yield f"Output throughput of the candidates: {span} times {base}'s."


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.2f} s"
