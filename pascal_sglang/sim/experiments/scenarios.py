"""Regimes, each in a file, every arm compared with round robin with restart, targets judged."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pascal_sglang.sim.arms import ARMS, INF, Arm, with_inf
from pascal_sglang.sim.cluster import Setup
from pascal_sglang.sim.experiments.paper import rate
from pascal_sglang.sim.experiments.runs import Task
from pascal_sglang.sim.experiments.tables import Rows, bin_tails, lay_out, mean, names, pick, shown
from pascal_sglang.sim.figures import ENOUGH_SAMPLES, bin_names
from pascal_sglang.sim.hardware import preset
from pascal_sglang.sim.workload import PLAIN, Shape, shape_of

FOLDER = Path(__file__).parents[3] / "evals" / "scenarios"
BASE = "rr-restart"
JUDGED = "pascal"
COMPARED = ("fcfs", "rr", BASE, "rr-restart+", "paper", JUDGED)
# What every regime asks of `JUDGED`, as the most of a ratio to `BASE`; a file may ask for less.
TARGETS = {"mean_ttfo": 1.0, "mean_e2e": 1.10, "mean_e2e_program": 1.02}
# Share of answers by which it may violate their objective more often than the best arm.
VIOLATIONS = 0.002
FIGURES = {
    "mean_ttfo": "mean TTFO",
    "p99_ttfo": "P99 TTFO",
    "p99_slowdown": "P99 slowdown",
    "mean_slowdown_big_prompts": "slowdown of big prompts",
    "mean_e2e": "mean e2e",
    "p99_e2e": "P99 e2e",
    "mean_e2e_program": "mean e2e, program-read",
    "mean_ttfo_interactive": "mean TTFO, interactive",
    "mean_ttfo_batch": "mean TTFO, others",
}


class ScenarioError(ValueError):
    """A file that holds no scenario; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A regime.

    loads: requests per run by share of what keeps memory full. kv_read_share: `hardware.Engine`.
    targets: at most this ratio to `BASE`, by figure; besides `TARGETS`.
    """

    name: str
    about: str
    source: str
    hardware: str
    instances: int
    loads: Mapping[float, int]
    seeds: int = 3
    tpot_ms: float = 100.0
    kv_read_share: float | None = None
    shape: Shape = PLAIN
    targets: Mapping[str, float] = field(default_factory=dict)

    def tasks(
        self, arms: Sequence[Arm], seeds: int | None = None, requests: int | None = None
    ) -> Iterator[Task]:
        """Every arm and seed under every load."""
        cost = preset(self.hardware, self.kv_read_share)
        setup = Setup(cost=cost, instances=self.instances, tpot=self.tpot_ms / 1e3)
        for load, count in self.loads.items():
            for seed in range(seeds or self.seeds):
                for arm in arms:
                    yield Task(
                        setup=setup,
                        arm=arm,
                        source=self.source,
                        scenario=self.name,
                        load=f"load {load:g}",
                        rate=rate(self.source, load, setup),
                        requests=requests or count,
                        seed=seed,
                        shape=self.shape,
                    )


def load(path: Path) -> Scenario:
    """Raises ScenarioError, or OSError where there is no file."""
    try:
        told = tomllib.loads(path.read_text())
        loads = {float(each["share"]): int(each["requests"]) for each in told.pop("load")}
        cost = preset(told["hardware"], told.get("kv_read_share"))
        shape = shape_of({"fits": cost.capacity, **told.pop("shape", {})})
        found = Scenario(name=path.stem, loads=loads, shape=shape, **told)
        unknown = set(found.targets) - set(FIGURES)
        if unknown or not loads:
            raise ValueError(f"no figure {', '.join(unknown)}" if unknown else "no load")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScenarioError(f"{path}: no scenario: {error!r}") from error
    return found


def load_all(wanted: Sequence[str], folder: Path = FOLDER) -> list[Scenario]:
    """Those named, each by its file or the name of one in `folder`; all of `folder` if none is."""
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if not wanted and not known:
        raise ScenarioError(f"{folder}: no scenarios there")
    return [load(known.get(name, Path(name))) for name in wanted or known]


def arms(chosen: Sequence[Arm] | None) -> list[Arm]:
    """Those compared; what everything is a ratio to, and `INF`, are always among them."""
    found = list(chosen or (ARMS[name] for name in COMPARED))
    return with_inf(found if ARMS[BASE] in found else [ARMS[BASE], *found])


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two arms, seed by seed: geometric mean, least and most."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.2f} ({self.low:.2f}..{self.high:.2f})"


def ratio(rows: Rows, arm: str, key: str, base: str = BASE) -> Ratio | None:
    """Of runs of one load; None where the figure is lacking."""
    theirs = {row["seed"]: row[key] for row in pick(rows, arm=base)}
    both = [(row[key], theirs.get(row["seed"])) for row in pick(rows, arm=arm)]
    logs = [math.log(ours / base) for ours, base in both if ours and base]
    if not logs:
        return None
    return Ratio(math.exp(sum(logs) / len(logs)), math.exp(min(logs)), math.exp(max(logs)))


def worst_bin_ratio(rows: Rows, arm: str) -> str:
    """The thinking-length bin in which the tail TTFO is worst against `BASE`."""
    ours, theirs = (bin_tails(pick(rows, arm=name)) for name in (arm, BASE))
    least = ENOUGH_SAMPLES * len(pick(rows, arm=BASE))
    found = [
        (a / b, name)
        for name, (a, count), (b, _) in zip(bin_names(), ours, theirs, strict=True)
        if a and b and count >= least
    ]
    return "{:.2f} ({})".format(*max(found)) if found else "-"


def violations(rows: Rows, arm: str) -> float:
    """Share of answers for human readers, mean over seeds."""
    return mean(pick(rows, arm=arm), "slo_violations") or 0.0


def table(rows: Rows) -> list[str]:
    """Ratios to `BASE` of one load, a line per arm: geometric mean over seeds, least and most.
    Columns without figures are left out."""
    keys = [key for key in FIGURES if any(row[key] is not None for row in rows)]
    lines = []
    for arm in names(rows, "arm"):
        ratios = [ratio(rows, arm, key) for key in keys]
        lines.append(
            (
                arm,
                *("-" if each is None else str(each) for each in ratios),
                worst_bin_ratio(rows, arm),
                shown(100 * violations(rows, arm)),
            )
        )
    head = (f"ratio to {BASE}", *(FIGURES[key] for key in keys), "worst bin", "SLO viol %")
    return lay_out(head, lines)


def verdicts(scenario: Scenario, rows: Rows) -> list[dict[str, Any]]:
    """The targets of one load and whether `JUDGED` met them (`evals.reporting.verdict.Target`)."""
    found: list[dict[str, Any]] = []
    for key, most in {**TARGETS, **scenario.targets}.items():
        seen = ratio(rows, JUDGED, key)
        if seen is not None:
            name = f"{FIGURES[key]} at most {most:.2f}x {BASE}"
            found.append({"name": name, "seen": str(seen), "passed": seen.point <= most})
    others = [arm for arm in names(rows, "arm") if arm not in (JUDGED, INF.name)]
    best = min(violations(rows, arm) for arm in others)
    ours, without = violations(rows, JUDGED), violations(rows, INF.name)
    found.append(
        {
            "name": f"SLO violations at most the best arm's + {100 * VIOLATIONS:g} points",
            "seen": f"{ours:.2%} (best {best:.2%}, INF {without:.2%})",
            "passed": ours <= best + VIOLATIONS,
        }
    )
    return found


def report(
    scenarios: Sequence[Scenario], rows: Rows
) -> tuple[list[str], dict[str, dict[str, list[dict[str, Any]]]]]:
    """Lines, and verdicts by load and arm."""
    lines: list[str] = []
    judged = {}
    for scenario in scenarios:
        for load_name in names(pick(rows, source=scenario.name), "load"):
            mine = pick(rows, source=scenario.name, load=load_name)
            lines += ["", f"== {scenario.name}, {load_name}: {scenario.about}", *table(mine)]
            if not pick(mine, arm=JUDGED):
                continue
            found = verdicts(scenario, mine)
            judged[f"{scenario.name}, {load_name}"] = {JUDGED: found}
            for each in found:
                word = "pass" if each["passed"] else "FAIL"
                lines.append(f"  {word}  {JUDGED}: {each['name']}: {each['seen']}")
    return lines, judged
