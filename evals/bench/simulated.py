"""Simulated against live: the same requests on a server and in the simulator.

`python -m evals.bench.simulated evals/arms/simulated.toml --out simulated.json` starts each arm,
fits the simulator's costs to one run before every other one, with a seed of its own, because
machines change their speed, and compares means of the others. With costs fitted to those runs
themselves it says besides what is left where the machine has not changed.
`--again simulated.json` simulates what was measured once more, without servers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals import arms
from evals.arms import Arm, Plan, serve
from evals.compare import CACHE, EXIT_BAD_INPUT, target_of
from evals.load.client import Replay, replay
from evals.load.items import Item
from evals.load.record import Record
from evals.load.server import ArmError
from evals.options import out_file
from evals.provenance import provenance
from evals.reporting.metrics import measure
from pascal_sglang.sim.arms import ARMS, STOCK
from pascal_sglang.sim.cluster import Setup, simulate
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.experiments.calibrate import Fit, Stream, fit
from pascal_sglang.sim.workload import from_rows

CALIBRATION_SEED = 100
# One copy of a paused request's KV on this CPU and each of its tokens, as `engine.kv.pool` measures
# them at start; the client cannot see them.
COPY_S, COPY_TOKEN_S = 2e-4, 1e-6
FIGURES = ("ttfo", "tpot", "e2e")


def items_of(plan: Plan, per_s: float, seed: int) -> list[Item]:
    return plan.items(per_s, seed)


def live_figures(
    records: Sequence[Record], items: Sequence[Item], tpot_s: float
) -> dict[str, float]:
    """Means over requests, seconds; SLO violations as a share."""
    seen = [measure(r, item, None, tpot_s) for r, item in zip(records, items, strict=True)]
    if any(not request.ok for request in seen):
        raise ArmError("a request failed; there is nothing to compare with")
    return {
        "ttfo": float(np.mean([r.ttfo_s for r in seen if r.ttfo_s is not None])),
        "tpot": float(np.mean([r.tpot_s for r in seen if r.tpot_s is not None])),
        "e2e": float(np.mean([r.e2e_s for r in seen if r.e2e_s is not None])),
        "slo_violations": float(np.mean([r.violates for r in seen])),
    }


def simulated(plan: Plan, arm: Arm, found: Fit, per_s: float, seed: int) -> dict[str, float]:
    """The same figures of the same requests from the simulator."""
    items = items_of(plan, per_s, seed)
    load = from_rows([dataclasses.asdict(item) for item in items])
    flags = dict(zip(plan.pascal_flags, plan.pascal_flags[1:], strict=False))
    capacity = arm.kv_tokens or plan.kv_tokens
    cost = Cost(
        **{
            name: getattr(found, name)
            for name in ("step_s", "request_s", "kv_token_s", "prefill_s", "prefill_token_s")
        },
        copy_s=COPY_S,
        copy_token_s=COPY_TOKEN_S,
        capacity=capacity,
        host=4 * capacity,
    )
    setup = Setup(
        cost=cost,
        instances=1,
        tpot=plan.target_tpot_ms / 1e3,
        knows_lengths=True,
        quantum=int(flags["--pascal-quantum-tokens"]),
        demote=int(flags["--pascal-demote-tokens"]),
    )
    name = STOCK if arm.command == "stock" else arm.name
    chosen = ARMS[name].but(name, migration="off")
    outcome = simulate(setup, chosen, load)
    output = np.array([item.output_tokens for item in items])
    return {
        "ttfo": float((outcome.first_answer - outcome.arrival).mean()),
        "tpot": float(((outcome.finished - outcome.first_token) / (output - 1)).mean()),
        "e2e": float((outcome.finished - outcome.arrival).mean()),
        "slo_violations": float((outcome.qoe < setup.slo).mean()),
    }


def measure_arm(plan: Plan, arm: Arm, model: Path, processor: str, seeds: int) -> dict[str, Any]:
    """Measure runs of an arm, each after one that costs are fitted to."""
    with serve(arm, plan, model) as server:
        target = target_of(plan, server, processor)

        def run(per_s: float, seed: int, most: int | None = None) -> tuple[list[Item], Any]:
            server.flush()
            items = items_of(plan, per_s, seed)[:most]
            return items, replay(items, target, seed=seed)

        run(plan.rates[0].per_s, CALIBRATION_SEED - 1, 20)  # Warms it up.
        runs = []
        for rate in plan.rates:
            for seed in range(seeds):
                found = fitted(*run(rate.per_s, CALIBRATION_SEED + seed))
                items, back = run(rate.per_s, seed)
                live = live_figures(back.records, items, plan.target_tpot_ms / 1e3)
                told = {"rate": rate.per_s, "seed": seed, "fit": found, "live": live}
                runs.append(told | {"own": {"fit": fitted(items, back)}})
    return {"runs": runs}


def fitted(items: list[Item], back: Replay) -> dict[str, Any]:
    """Costs, by when the tokens of a run came."""
    streams = [
        Stream(item.prompt_tokens, record.token_s)
        for item, record in zip(items, back.records, strict=True)
    ]
    return dataclasses.asdict(fit(streams))


def compare(plan: Plan, told: dict[str, Any]) -> list[str]:
    """Simulate what was measured; lines with the error of every figure, and over all runs."""
    lines = [
        f"{'arm':<12}{'req/s':>6}{'seed':>5}"
        + "".join(f"{f'{name} live':>12}{'sim':>8}{'error':>8}" for name in FIGURES)
        + f"{'viol live':>11}{'sim':>7}"
    ]
    errors: dict[str, list[float]] = {name: [] for name in FIGURES}
    own_errors: dict[str, list[float]] = {name: [] for name in FIGURES}
    for arm in plan.arms:
        if arm.name not in told:
            continue
        for run in told[arm.name]["runs"]:
            found = Fit(**run["fit"])
            sim = simulated(plan, arm, found, run["rate"], run["seed"])
            run["simulated"] = sim
            # Without costs of its own in a file of an earlier version.
            if (own := run.get("own")) is not None:
                again = simulated(plan, arm, Fit(**own["fit"]), run["rate"], run["seed"])
                own["simulated"] = again
                for name in FIGURES:
                    own_errors[name].append(again[name] / run["live"][name] - 1)
            line = f"{arm.name:<12}{run['rate']:>6g}{run['seed']:>5}"
            for name in FIGURES:
                live, unit = run["live"][name], 1e3 if name == "tpot" else 1.0
                error = sim[name] / live - 1
                errors[name].append(error)
                line += f"{unit * live:>12.2f}{unit * sim[name]:>8.2f}{error:>+8.1%}"
            violated = run["live"]["slo_violations"], sim["slo_violations"]
            lines.append(line + f"{violated[0]:>11.1%}{violated[1]:>7.1%}")
            lines.append(
                f"  step {1e3 * found.step_s:.2f} ms + {1e3 * found.request_s:.3f} ms per request"
                f" + {1e6 * found.kv_token_s:.3f} us per KV token; "
                f"prefill {1e3 * found.prefill_s:.2f} ms"
                f" + {1e6 * found.prefill_token_s:.0f} us per token; "
                f"{found.gaps} gaps, {found.error:.0%} of one unexplained"
            )
    lines.append("TTFO and e2e in seconds, TPOT in milliseconds, means over requests")
    for when, found_errors in (("", errors), (", fitted to itself", own_errors)):
        lines += [
            f"{name}{when}: mean error {np.mean(each):+.1%}, "
            f"mean absolute {np.mean(np.abs(each)):.1%}, worst {max(each, key=abs):+.1%}"
            for name, each in found_errors.items()
            if each
        ]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the simulator with live servers.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="runs per load")
    parser.add_argument("--out", type=out_file, default=str(CACHE / "simulated.json"))
    parser.add_argument("--again", type=Path, help="a file of an earlier --out: only simulate")
    asked = parser.parse_args(argv)
    try:
        plan = arms.load_plan(asked.plan)
        told = json.loads(asked.again.read_text())["arms"] if asked.again else {}
        if not asked.again:
            # Leaving by an exception takes the running server along.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            model = arms.models(plan, CACHE)
            processor = arms.processor_of(plan)
            for arm in plan.arms:
                print(f"{arm.name}: measuring", flush=True)
                told[arm.name] = measure_arm(plan, arm, model, processor, asked.seeds)
        lines = compare(plan, told)
    except (ArmError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"evals: error: {asked.plan}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join(lines))
    asked.out.write_text(
        json.dumps(
            {
                "arms": told,
                "console": lines,
                "provenance": provenance("evals.bench.simulated", sys.argv[1:]),
            },
            indent=1,
        )
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
