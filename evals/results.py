"""Result files of `evals.compare` and `evals.serving`, read into one shape for a page."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals import arms
from evals.verdict import Target


class ResultError(ValueError):
    """A file that holds no results; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One run. `per_s`: requests per second, None where the arrivals were a file's own.

    edges: inner edges of its thinking-length bins. summary: as the run wrote it; keys may lack.
    """

    arm: str
    rate: str
    per_s: float | None
    seed: int
    edges: tuple[float, ...]
    summary: Mapping[str, Any]
    counters: Mapping[str, float] = field(default_factory=dict)
    lag_p99_ms: float | None = None


@dataclass(slots=True)
class Results:
    """Everything a page shows; whatever a file did not say stays empty.

    about: what was run, in words. commands: how each arm, and the benchmark itself, was started, by
    name. verdicts: by load and arm. notes: what a reader must know before trusting a figure.
    """

    runs: list[Shown] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, dict[str, list[Target]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def loads(self) -> list[tuple[str, float | None]]:
        """Loads from light to heavy; those without a rate come first."""
        seen = dict.fromkeys((run.rate, run.per_s) for run in self.runs)
        return sorted(seen, key=lambda load: -1.0 if load[1] is None else load[1])

    def of(self, arm: str, rate: str) -> list[Shown]:
        """One arm's runs under one load, a run per seed."""
        return [run for run in self.runs if (run.arm, run.rate) == (arm, rate)]


def load(paths: Sequence[Path]) -> Results:
    """All runs of all files. Raises ResultError, naming the file."""
    together = Results()
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ResultError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            add(together, text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{path}: not a result of evals: {error!r}") from error
    if not together.runs:
        raise ResultError("no runs in " + ", ".join(map(str, paths)))
    return together


def add(results: Results, text: str) -> None:
    """Add a file's text: one JSON object of `evals.compare`, or a line of JSON per run."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "simulated" in whole:
        add_simulation(results, whole)
        return
    if isinstance(whole, dict) and "runs" in whole:
        add_comparison(results, whole)
        return
    for line in text.splitlines():
        if line.strip():
            add_serving(results, json.loads(line))


def add_comparison(results: Results, told: Mapping[str, Any]) -> None:
    """What `evals.compare` wrote, finished or not."""
    plan = told["plan"]
    rates = {rate["name"]: rate["per_s"] for rate in plan["rates"]}
    results.runs += [
        Shown(
            arm=run["arm"],
            rate=run["rate"],
            per_s=rates.get(run["rate"]),
            seed=run["seed"],
            edges=tuple(told["bin_edges"]),
            summary=run["summary"],
            counters=run.get("counters", {}),
            lag_p99_ms=run.get("lag_p99_ms"),
        )
        for run in told["runs"]
    ]
    whole = _plan(plan)
    if whole is not None:
        results.about += whole.describe()
        results.commands |= _commands(whole)
    _add_provenance(results, told.get("provenance", {}), "comparison")
    results.notes += [f"{arm} gave up: {why}" for arm, why in told["failed_arms"].items()]
    compared = told.get("comparison", {})
    results.notes += [f"output differs: {text}" for text in compared.get("token_mismatches", [])]
    for rate, found in compared.get("loads", {}).items():
        for arm, figures in found.items():
            if "verdict" in figures:
                targets = [Target(**target) for target in figures["verdict"]]
                results.verdicts.setdefault(rate, {})[arm] = targets


def add_simulation(results: Results, told: Mapping[str, Any]) -> None:
    """What `pascal_sglang.sim --out` wrote. Loads of different data sets are no points of one axis,
    so they stand by name."""
    results.runs += [
        Shown(
            arm=run["arm"],
            rate=f"{run['source']}, {run['load']}",
            per_s=None,
            seed=run["seed"],
            edges=tuple(told["simulated"]),
            summary={**run, "output_throughput": run["throughput"]},
        )
        for run in told["runs"]
    ]
    command = ["python", "-m", "pascal_sglang.sim", *told["command"]]
    results.commands["simulation"] = shlex.join(command)
    results.notes.append("simulated: no server was measured")


def add_serving(results: Results, told: Mapping[str, Any]) -> None:
    """One line of `evals.serving`."""
    per_s: float | None
    try:
        per_s = float(told["request_rate"])
    except ValueError:
        per_s = None
    info = told.get("server_info", {})
    arm = str(told.get("tag") or info.get("model_path") or told["base_url"])
    dataset = told["dataset_name"]
    results.runs.append(
        Shown(
            arm=arm,
            rate=f"{dataset}, {told['request_rate']}"
            + ("/s" if per_s is not None and math.isfinite(per_s) else ""),
            per_s=per_s,
            seed=told["seed"],
            edges=tuple(told["bin_edges"]),
            summary=told,
            counters=told.get("counters", {}),
            lag_p99_ms=told.get("lag_p99_ms"),
        )
    )
    if "launch_command" in info:
        results.commands[arm] = info["launch_command"]
    provenance = dict(told.get("provenance", {}))
    if "version" in info:
        results.versions[f"sglang ({arm})"] = info["version"]
        # The server's word counts; what is installed beside the client need not be what served.
        provenance["versions"] = {
            k: v for k, v in provenance.get("versions", {}).items() if k != "sglang"
        }
    _add_provenance(results, provenance, f"run {len(results.runs)}, {arm}")
    if told.get("interrupted"):
        results.notes.append(f"run {len(results.runs)}, {arm}, was interrupted")


def _add_provenance(results: Results, told: Mapping[str, Any], name: str) -> None:
    if "command" in told:
        results.commands[name] = told["command"]
    results.versions |= told.get("versions", {})


def _plan(told: Mapping[str, Any]) -> arms.Plan | None:
    """The plan of a result; None for one of another version."""
    known = {f.name for f in dataclasses.fields(arms.Plan)}
    try:
        every = {
            "arms": tuple(arms.Arm(**arm) for arm in told["arms"]),
            "rates": tuple(arms.Rate(**rate) for rate in told["rates"]),
        }
        return arms.Plan(**{**{k: v for k, v in told.items() if k in known}, **every})
    except (TypeError, KeyError, arms.ArmError):
        return None


def _commands(plan: arms.Plan) -> dict[str, str]:
    """How each arm was started, without its address."""
    return {
        arm.name: shlex.join(["python", *arms.command_line(arm, plan, Path("MODEL"))[1:]])
        for arm in plan.arms
    }
