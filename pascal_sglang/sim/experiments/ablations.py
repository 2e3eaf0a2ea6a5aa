"""What `pascal` changes about the paper's rules, one change at a time and together, from low load
to overload."""

from __future__ import annotations

from collections.abc import Sequence

from pascal_sglang.sim.arms import ARMS, INF, PAPER, PASCAL, Arm
from pascal_sglang.sim.cluster import Setup
from pascal_sglang.sim.experiments.paper import HARDWARE, REQUESTS, SEEDS, rate
from pascal_sglang.sim.experiments.runs import Task
from pascal_sglang.sim.hardware import PRESETS

SOURCE = "arena-hard"
LOADS = (0.5, 0.8, 1.0, 1.15, 1.3)
# What each remedy is in the terms of `Arm`: in `paper`, and in `pascal`.
REMEDIES: dict[str, dict[str, tuple[object, object]]] = {
    "SLO guard": {"policy": ("paper", "pascal")},
    "lazy migration": {"lazy": (False, True)},
    "counts at once": {"optimistic": (False, True)},
    "status now": {"sticky": (True, False)},
    "live copy": {"live": (False, True)},
    "predicted TTFO": {"predict": (False, True)},
    "no migration": {"migration": ("adaptive", "off")},
}
# How requests move, which changes nothing where none does.
OF_MIGRATION = ("lazy migration", "live copy")
BASES = ("fcfs", "rr", "rr-restart")


def arms() -> list[Arm]:
    """The baselines, the paper's rules, each remedy alone, all of them, and all but each that
    changes something there."""
    found = [INF, *(ARMS[name] for name in BASES), PAPER]
    for name, changes in REMEDIES.items():
        found.append(PAPER.but(f"paper + {name}", **{k: v[1] for k, v in changes.items()}))
    found.append(PASCAL)
    for name, changes in REMEDIES.items():
        if name not in OF_MIGRATION:
            found.append(PASCAL.but(f"pascal - {name}", **{k: v[0] for k, v in changes.items()}))
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
