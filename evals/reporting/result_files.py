"""Result files of every tool here that writes one, read into one shape for a page."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals import arms
from evals.gpu.figures import (
    identity_lines,
    moves_head,
    moves_line,
    overhead_lines,
    probe_text,
    step_lines,
)
from evals.gpu.identity import Identity
from evals.gpu.moves import Row
from evals.grading.parity import Parity
from evals.load.remote import without_keys
from evals.load.server import ArmError
from evals.reporting import words
from evals.reporting.results import ResultError, Results, Shown
from evals.reporting.verdict import Target
from evals.workload import shape_of

# The simulator's names of what `evals.reporting.metrics` measures.
MEASURED = {
    "ttft": "ttft",
    "ttfo": "ttfo",
    "tpot": "tpot",
    "answer_tpot": "answer_tpot",
    "blocking": "blocking",
    "e2e": "e2e_latency",
}


def load(paths: Sequence[Path]) -> Results:
    """All runs of all files. Raises ResultError, naming the file."""
    together = Results()
    for path in paths:
        try:
            text = read(path)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ResultError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            add(together, text, path.parent)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{path}: not a result of evals: {error!r}") from error
        except OSError as error:
            raise ResultError(f"{path}: {error.filename}: {error.strerror}") from error
    if not together.runs:
        raise ResultError("no runs in " + ", ".join(map(str, paths)))
    return together


def read(path: Path) -> str:
    """A file's text; of one that ends in `.gz`, what was compressed."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text()


def add(results: Results, text: str, folder: Path) -> None:
    """Add a file's text: one JSON object, known by its keys, or a line of JSON per run.

    folder: where the file lies, and others that it names.
    """
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    keys = whole if isinstance(whole, dict) else {}
    if "simulated" in keys:
        add_simulation(results, keys)
    elif "parts" in keys:
        add_check(results, keys, folder)
    elif "runs" in keys:
        add_comparison(results, keys)
    elif "dataset" in keys:
        add_accuracy(results, keys)
    elif "arms" in keys:
        add_against_live(results, keys)
    else:
        for line in text.splitlines():
            if line.strip():
                add_serving(results, json.loads(line))


def add_comparison(results: Results, told: Mapping[str, Any], part: str = "") -> None:
    """What `evals.compare` wrote, finished or not.

    part: what it is called among several, whose loads are no points of one axis.
    """
    plan = told["plan"]
    rates = {rate["name"]: rate["per_s"] for rate in plan["rates"]}
    names = {
        rate: f"{part}: {rate}, {per_s:g}/s" if part else rate for rate, per_s in rates.items()
    }
    results.runs += [
        Shown(
            arm=run["arm"],
            rate=names[run["rate"]],
            per_s=None if part else rates[run["rate"]],
            seed=run["seed"],
            edges=tuple(told["bin_edges"]),
            summary=run["summary"],
            counters=run.get("counters", {}),
            lag_p99_ms=run.get("lag_p99_ms"),
        )
        for run in told["runs"]
    ]
    for arm in plan["arms"]:
        results.roles[arm["name"]] = arm["role"]
        results.arm_words[arm["name"]] = words.arm({"flags": (), **arm})
    whole = _plan(plan)
    if whole is not None:
        results.about += whole.describe()
        results.commands |= _commands(whole)
    _add_provenance(results, told.get("provenance", {}), part or "comparison")
    results.notes += [f"{arm} gave up: {why}" for arm, why in told["failed_arms"].items()]
    compared = told.get("comparison", {})
    results.notes += [f"output differs: {text}" for text in compared.get("token_mismatches", [])]
    for rate, found in compared.get("loads", {}).items():
        for arm, figures in found.items():
            if "verdict" in figures:
                targets = [Target(**target) for target in figures["verdict"]]
                results.verdicts.setdefault(names[rate], {})[arm] = targets


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
            summary=_simulated(run),
        )
        for run in told["runs"]
    ]
    provenance = told["provenance"]
    results.about.append("simulated at {commit}, {date}, {machine}".format(**provenance))
    _add_provenance(results, provenance, "simulation")
    for load_name, by_arm in told.get("verdicts", {}).items():
        judged = {arm: [Target(**each) for each in found] for arm, found in by_arm.items()}
        results.verdicts[load_name] = judged
    results.notes.append("simulated: no server was measured")


def _simulated(run: Mapping[str, Any]) -> dict[str, Any]:
    """A simulated run under the names of `evals.reporting.metrics`. A run whose requests have not
    all ended is an error of the simulator, and gives no figures."""
    named = {
        f"{stat}_{ours}_ms": 1e3 * value
        for name, ours in MEASURED.items()
        for stat in ("mean", "median", "p90", "p99", "max")
        if (value := run.get(f"{stat}_{name}")) is not None
    }
    ended = {"completed": run["requests"], "failed": 0, "no_answer": 0}
    return {**run, **named, **ended, "output_throughput": run["throughput"]}


def add_against_live(results: Results, told: Mapping[str, Any]) -> None:
    """What `evals.bench.simulated` wrote: every run on a server and in the simulator."""
    for name, arm in told["arms"].items():
        for run in arm["runs"]:
            for where in ("live", "simulated"):
                means = {
                    f"mean_{MEASURED[n]}_ms": 1e3 * run[where][n] for n in ("ttfo", "tpot", "e2e")
                }
                results.runs.append(
                    Shown(
                        arm=f"{name}, {where}",
                        rate=f"{run['rate']:g}/s",
                        per_s=run["rate"],
                        seed=run["seed"],
                        edges=(),
                        summary={**means, "slo_violations": run[where]["slo_violations"]},
                    )
                )
    results.arm_words |= {
        f"{name}, {where}": f"{words.POLICIES.get(name, name)}; {meaning}"
        for name in told["arms"]
        for where, meaning in (("live", "a server"), ("simulated", "the simulator, same requests"))
    }
    errors = [line.split(":", 1) for line in told["console"] if "mean error" in line]
    results.conclusions += [
        f"Simulator against servers, {figure}:{error}." for figure, error in errors
    ]
    _add_provenance(results, told["provenance"], "comparison")


def add_accuracy(results: Results, told: Mapping[str, Any]) -> None:
    """What `evals.accuracy` wrote."""
    for name, arm in told["arms"].items():
        ttfos = [item["ttfo_ms"] for item in arm["items"]]
        results.runs.append(
            Shown(
                arm=name,
                rate=told["dataset"],
                per_s=None,
                seed=arm["endpoint"]["seed"],
                edges=(),
                summary={**arm, "ttfos": [None if t is None else t / 1e3 for t in ttfos]},
            )
        )
        _add_server(results, name, arm["server_info"])
    results.about.append(f"accuracy on {told['dataset']}, graded by {told['grader']}")
    for pair in told["parity"]:
        holds = pair["holds"]
        line = str(Parity(**{key: value for key, value in pair.items() if key != "holds"}))
        (results.about if holds else results.notes).append(line)
    if told["interrupted"]:
        results.notes.append("interrupted")
    _add_provenance(results, told["provenance"], "accuracy")


def add_check(results: Results, told: Mapping[str, Any], folder: Path) -> None:
    """What `evals.gpu.check` wrote, with the comparisons beside it."""
    results.about.append("; ".join(f"{name} {value}" for name, value in told["device"].items()))
    for name, part in told["parts"].items():
        lines: list[str] = []
        if "results" in part:
            add_comparison(results, json.loads((folder / part["results"]).read_text()), name)
            lines = overhead_lines(part["overhead"]) + step_lines(part.get("steps", {}))
        elif "rows" in part:
            lines = [moves_head(), *(moves_line(Row(**row)) for row in part["rows"])]
        elif "holds" in part:
            fields = {field.name for field in dataclasses.fields(Identity)}
            found = Identity(**{key: value for key, value in part.items() if key in fields})
            lines = identity_lines(found)
        else:
            lines = [probe_text(told) for told in part.values() if isinstance(told, dict)]
        results.about += [f"{name}: {line}" for line in lines]
    results.notes += told["failed"]
    _add_provenance(results, told["provenance"], "check")


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
    _add_server(results, arm, info)
    provenance = dict(told.get("provenance", {}))
    if "version" in info:
        # The server's word counts; what is installed beside the client need not be what served.
        provenance["versions"] = {
            k: v for k, v in provenance.get("versions", {}).items() if k != "sglang"
        }
    _add_provenance(results, provenance, f"run {len(results.runs)}, {arm}")
    if told.get("interrupted"):
        results.notes.append(f"run {len(results.runs)}, {arm}, was interrupted")


def _add_server(results: Results, arm: str, info: Mapping[str, Any]) -> None:
    """What a server said of itself."""
    if "launch_command" in info:
        results.commands[arm] = info["launch_command"]
    if "version" in info:
        results.versions[f"sglang ({arm})"] = info["version"]


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
        # Earlier versions have it beside the shape, which they lack.
        shape = shape_of(told.get("shape", {"cv": told.get("cv", 1.0)}))
        mine = {k: v for k, v in told.items() if k in known}
        return arms.Plan(**{**mine, **every, "shape": shape})
    except (TypeError, KeyError, ArmError):
        return None


def _commands(plan: arms.Plan) -> dict[str, str]:
    """How each arm was started, without its address."""
    return {
        arm.name: without_keys(
            shlex.join(["python", *arms.command_line(arm, plan, Path("MODEL"))[1:]])
        )
        for arm in plan.arms
    }
