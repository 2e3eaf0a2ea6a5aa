"""What `pascal` changes about the paper's rules, one change at a time and together (DESIGN section
7), from low load to overload."""

from __future__ import annotations

from collections.abc import Sequence

from pascal_sglang.sim.arms import ARMS, PAPER, PASCAL, Arm
from pascal_sglang.sim.cluster import Setup
from pascal_sglang.sim.experiments.paper import HARDWARE, REQUESTS, SEEDS, rate
from pascal_sglang.sim.experiments.runs import Task
from pascal_sglang.sim.experiments.tables import Rows, lay_out, mean, names, pick, shown
from pascal_sglang.sim.hardware import PRESETS

SOURCE = "arena-hard"
LOADS = (0.5, 0.8, 1.0, 1.15, 1.3)
# What each remedy is in the terms of `Arm`: in `paper`, and in `pascal`.
REMEDIES: dict[str, dict[str, tuple[object, object]]] = {
    "SLO guard": {"order": ("paper", "pascal")},
    "lazy migration": {"lazy": (False, True)},
    "counts at once": {"optimistic": (False, True)},
    "status now": {"sticky": (True, False)},
    "live copy": {"live": (False, True)},
    "predicted TTFO": {"predict": (False, True)},
    "no migration": {"migration": ("adaptive", "off")},
}
BASES = ("fcfs", "rr", "rr-restart")


def arms() -> list[Arm]:
    """The baselines, the paper's rules, each remedy alone, all of them, and all but each."""
    found = [*(ARMS[name] for name in BASES), PAPER]
    for name, changes in REMEDIES.items():
        found.append(PAPER.but(f"paper + {name}", **{k: v[1] for k, v in changes.items()}))
    found.append(PASCAL)
    for name, changes in REMEDIES.items():
        # Not moving is no part of `pascal`, so the arm without it has it.
        side = 1 if name == "no migration" else 0
        sign = "+" if side else "-"
        found.append(
            PASCAL.but(f"pascal {sign} {name}", **{k: v[side] for k, v in changes.items()})
        )
    return found


def tasks(
    source: str = SOURCE,
    loads: Sequence[float] = LOADS,
    seeds: int = SEEDS,
    requests: int = REQUESTS,
    chosen: Sequence[Arm] | None = None,
) -> list[Task]:
    setup = Setup(cost=PRESETS[HARDWARE])
    return [
        Task(
            setup=setup,
            arm=arm,
            source=source,
            load=f"{load:g}",
            rate=rate(source, load, setup),
            requests=requests,
            seed=seed,
        )
        for load in loads
        for arm in (chosen or arms())
        for seed in range(seeds)
    ]


def table(rows: Rows) -> list[str]:
    """A line per arm, a group of columns per load: mean TTFO (s), P99 slowdown, SLO violations (%),
    share of requests that moved (%)."""
    loads = names(rows, "load")
    head = [
        "",
        *(f"{load}: {name}" for load in loads for name in ("TTFO", "slow", "viol", "moved")),
    ]
    lines = []
    for arm in names(rows, "arm"):
        line = [arm]
        for load in loads:
            mine = pick(rows, arm=arm, load=load)
            moved = mean(mine, "moved")
            violated = mean(mine, "slo_violations")
            line += [
                shown(mean(mine, "mean_ttfo")),
                shown(mean(mine, "p99_slowdown")),
                shown(None if violated is None else 100 * violated),
                shown(None if moved is None else 100 * moved / mine[0]["requests"], 0),
            ]
        lines.append(line)
    return lay_out(head, lines)
