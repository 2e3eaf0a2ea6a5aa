"""`python -m pascal_sglang.sim`: the paper's comparison, and any workload on any cluster."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pascal_sglang.policy.registry import UnknownPolicy
from pascal_sglang.sim import cost as costs
from pascal_sglang.sim import workload
from pascal_sglang.sim.arms import ARMS, Arm, arm_of, with_inf
from pascal_sglang.sim.cluster import Setup
from pascal_sglang.sim.experiments import ablations, calibration, paper, scenarios, tables, topology
from pascal_sglang.sim.experiments.provenance import provenance
from pascal_sglang.sim.experiments.runs import Task, run_all
from pascal_sglang.sim.figures import BIN_EDGES
from pascal_sglang.sim.hardware import PRESETS, preset
from pascal_sglang.sim.workload import Shape

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pascal_sglang.sim", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    compared = ways.add_parser("paper", help="rerun the paper's comparison, figures beside ours")
    compared.add_argument("--requests", type=_count, default=paper.REQUESTS, help="per run")
    alone = ways.add_parser("remedies", help="what `pascal` changes, one by one and together")
    alone.add_argument("--source", choices=workload.SOURCES, default=ablations.SOURCE)
    alone.add_argument("--requests", type=_count, default=paper.REQUESTS, help="per run")
    single = ways.add_parser("run", help="a workload on a cluster")
    single.add_argument(
        "source", help=f"{', '.join(workload.SOURCES)}, or a file of `evals.workload`"
    )
    single.add_argument("--instances", type=_count, default=8)
    single.add_argument("--requests", type=_count, default=2000)
    how = single.add_mutually_exclusive_group()
    how.add_argument("--rate", type=_positive, help="requests per second, of all instances")
    how.add_argument("--load", type=_positive, help="share of what keeps memory full (0.8)")
    single.add_argument("--hardware", choices=PRESETS, default=paper.HARDWARE)
    single.add_argument(
        "--kv-read-share",
        type=_positive,
        help="of the memory's bandwidth that KV reads reach (0.8)",
    )
    single.add_argument("--cost", type=Path, help="a measured cost file instead of --hardware")
    single.add_argument("--tpot-ms", type=_positive, default=100.0, help="the reader's pace")
    single.add_argument("--quantum-tokens", type=_count, default=500)
    single.add_argument("--demote-tokens", type=_count, default=5000)
    single.add_argument(
        "--known-lengths", action="store_true", help="requests say how much they will generate"
    )
    single.add_argument(
        "--tenants", type=_weights, default=(), help="requests of each, as multiples: 10,1"
    )
    regimes = ways.add_parser("scenarios", help="regimes, each with its targets and a verdict")
    regimes.add_argument("names", nargs="*", metavar="NAME", help="of a scenario, or its file")
    regimes.add_argument("--requests", type=_count, help="per run, instead of the scenario's")
    forecast = ways.add_parser(
        "calibration", help="whether forecasts of the time to an answer hold"
    )
    forecast.add_argument("--source", choices=workload.SOURCES, default="arena-hard")
    forecast.add_argument("--hardware", choices=PRESETS, default=paper.HARDWARE)
    forecast.add_argument("--instances", type=_count, default=1)
    forecast.add_argument("--requests", type=_count, default=1000, help="per run")
    forecast.add_argument(
        "--budgets",
        type=_share,
        default=0.0,
        help="share of the requests whose thinking budget tells how long they think",
    )
    forecast.add_argument(
        "--burst",
        type=_burst,
        help="seconds with arrivals and seconds without, in turn: 5,95",
    )
    between = ways.add_parser("topology", help="moves between hosts and racks, near ones first")
    between.add_argument("--requests", type=_count, default=2000, help="per run")
    for each in (compared, alone, single, regimes, forecast, between):
        each.add_argument("--arms", type=_arms, default=None, help="by comma; all by default")
        of_scenario = None if each is regimes else paper.SEEDS
        each.add_argument("--seeds", type=_count, default=of_scenario)
        each.add_argument("--processes", type=_count, help="all cores by default")
        each.add_argument("--out", type=_file, help="JSON file for all figures")
    asked = parser.parse_args(argv)
    try:
        ways_to = {
            "paper": _paper,
            "remedies": _remedies,
            "run": _run,
            "scenarios": _scenarios,
            "calibration": _calibration,
            "topology": _topology,
        }
        return ways_to[asked.way](asked)
    except (ValueError, OSError) as error:
        print(f"sim: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _paper(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    print(paper.choices(asked.requests))
    arms = with_inf(asked.arms or list(ARMS.values()))
    rows = run_all(paper.tasks(arms, asked.seeds, asked.requests), asked.processes)
    print("\n".join(tables.report(rows)))
    print("\n== The paper's figures beside ours")
    print("\n".join(paper.against(rows)))
    print(f"\n{len(rows)} runs, every one with its books balanced, {_took(began)}")
    return _save(rows, asked.out)


def _remedies(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    tasks = ablations.tasks(
        asked.source,
        seeds=asked.seeds,
        requests=asked.requests,
        chosen=with_inf(asked.arms) if asked.arms else None,
    )
    rows = run_all(tasks, asked.processes)
    print("\n".join(tables.report(rows)))
    print(f"\n{_took(began)}")
    return _save(rows, asked.out)


def _run(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    setup = Setup(
        cost=costs.load(asked.cost) if asked.cost else preset(asked.hardware, asked.kv_read_share),
        instances=asked.instances,
        tpot=asked.tpot_ms / 1e3,
        quantum=asked.quantum_tokens,
        demote=asked.demote_tokens,
        knows_lengths=asked.known_lengths,
    )
    given = None
    if asked.source in workload.SOURCES:
        rate = asked.rate or paper.rate(asked.source, asked.load or 0.8, setup)
        requests, seeds = asked.requests, asked.seeds
    else:
        if not Path(asked.source).is_file():
            raise ValueError(
                f"no source and no file {asked.source!r}; sources are {', '.join(workload.SOURCES)}"
            )
        given = workload.read(Path(asked.source))
        requests, seeds = len(given), 1
        rate = requests / max(1e-9, max(given.arrival_s))
    tasks = [
        Task(
            setup=setup,
            arm=arm,
            source=asked.source,
            load=f"{setup.instances} instances",
            rate=rate,
            requests=requests,
            seed=seed,
            shape=Shape(fits=setup.cost.capacity, tenants=asked.tenants),
            workload=given,
        )
        for arm in with_inf(asked.arms or list(ARMS.values()))
        for seed in range(seeds)
    ]
    rows = run_all(tasks, asked.processes)
    print("\n".join(tables.report(rows)))
    per_request = 1e6 * sum(row["wall_s"] for row in rows) / sum(row["requests"] for row in rows)
    print(f"\n{_took(began)}, {per_request:.0f} microseconds of one core per request")
    return _save(rows, asked.out)


def _scenarios(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    chosen = scenarios.load_all(asked.names)
    arms = scenarios.arms(asked.arms)
    tasks = [task for each in chosen for task in each.tasks(arms, asked.seeds, asked.requests)]
    rows = run_all(tasks, asked.processes)
    lines, verdicts = scenarios.report(chosen, rows)
    print("\n".join([*tables.report(rows), *lines]))
    print(f"\n{len(rows)} runs, {_took(began)}")
    return _save(rows, asked.out, verdicts=verdicts)


def _topology(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    tasks = list(topology.tasks(asked.seeds, asked.requests, asked.arms))
    rows = run_all(tasks, asked.processes, topology.run)
    print("\n".join(topology.table(rows)))
    print(f"\n{len(rows)} runs, {_took(began)}")
    return _save(rows, asked.out)


def _calibration(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    tasks = [
        task
        for arm in asked.arms or [ARMS["pascal"]]
        for task in calibration.tasks(
            asked.source,
            asked.hardware,
            asked.instances,
            arm,
            asked.seeds,
            asked.requests,
            asked.budgets,
            asked.burst,
        )
    ]
    rows = run_all(tasks, asked.processes, calibration.calibrate)
    print("\n".join(calibration.report(rows)))
    print(f"\n{len(rows)} runs, {_took(began)}")
    return _save(rows, asked.out)


def _took(began: float) -> str:
    """Since `began`, and what all processes of the pool computed."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_s = sum(each.ru_utime + each.ru_stime for each in spent)
    return f"{time.monotonic() - began:.0f} s, {cpu_s:.0f} s of CPU"


def _save(rows: list[dict[str, Any]], out: Path | None, **more: object) -> int:
    if out is not None:
        told = {
            "simulated": list(BIN_EDGES),
            "provenance": provenance("pascal_sglang.sim", sys.argv[1:]),
            **more,
        }
        # A line per run.
        runs = ",\n".join(json.dumps(_rounded(row)) for row in rows)
        out.write_text(f'{json.dumps(told, indent=1)[:-2]},\n "runs": [\n{runs}\n]}}\n')
        print(f"written to {out}")
    return 0


def _rounded(value: Any) -> Any:
    """To six digits, which is more than any figure is good for."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _arms(text: str) -> list[Arm]:
    names = text.split(",")
    unknown = [name for name in names if name.partition("@")[0] not in ARMS and ":" not in name]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}, MODULE:NAME of a policy, "
            "and either with @FIELD=NUMBER"
        )
    try:
        return [arm_of(name) for name in names]
    except UnknownPolicy as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file(text: str) -> Path:
    """A file that can be written when all has been run."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder, or no file")
    return path


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _weights(text: str) -> tuple[float, ...]:
    return tuple(_positive(each) for each in text.split(","))


def _burst(text: str) -> tuple[float, float]:
    on_s, off_s = text.split(",")
    return _positive(on_s), _positive(off_s)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
