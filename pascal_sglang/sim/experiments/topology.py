"""Moves between hosts and racks: what is gained if they go to near instances among alike ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pascal_sglang.policy.site import FAR, SAME_HOST, SAME_RACK
from pascal_sglang.sim.arms import ARMS, Arm
from pascal_sglang.sim.cluster import Setup, simulate
from pascal_sglang.sim.experiments.paper import rate
from pascal_sglang.sim.experiments.runs import Task
from pascal_sglang.sim.experiments.tables import Rows, lay_out, mean, names, pick, shown
from pascal_sglang.sim.hardware import MACHINES, derive
from pascal_sglang.sim.topology import Topology
from pascal_sglang.sim.workload import Shape, draw

HARDWARE = "r1-qwen-32b-h100-80"
INSTANCES = 16
PER_HOST, PER_RACK = 4, 2
# Bytes a second: NVLink 4 between two GPUs of a host one way; 100 and 10 gigabits a second.
HOST, RACK, FAR_LINK = 450e9, 12.5e9, 1.25e9
# Of these, what is reached (`hardware.Engine.network_share`).
SHARE = 0.9
ARMS_MOVING = ("paper", "pascal-migration")
SOURCE, LOAD, CV = "servegen-r1", 0.8, 4.0


def topology(kv_token_bytes: float) -> Topology:
    """Two racks of two hosts of four instances."""
    return Topology(
        per_host=PER_HOST,
        per_rack=PER_RACK,
        host_token_s=kv_token_bytes / (HOST * SHARE),
        rack_token_s=kv_token_bytes / (RACK * SHARE),
        far_token_s=kv_token_bytes / (FAR_LINK * SHARE),
    )


def tasks(seeds: int, requests: int, arms: Sequence[Arm] | None = None) -> Iterator[Task]:
    """Each arm with `near` off and on."""
    model, device, engine = MACHINES[HARDWARE]
    cost = derive(model, device, engine)
    flat = Setup(cost=cost, instances=INSTANCES)
    setup = dataclasses.replace(flat, topology=topology(model.kv_token_bytes))
    for arm in arms or [ARMS[name] for name in ARMS_MOVING]:
        for near in (False, True):
            for seed in range(seeds):
                yield Task(
                    setup=setup,
                    arm=arm.but(f"{arm.name}, {'near first' if near else 'anywhere'}", near=near),
                    source=SOURCE,
                    load=f"load {LOAD:g}, CV {CV:g}",
                    rate=rate(SOURCE, LOAD, flat),
                    requests=requests,
                    seed=seed,
                    shape=Shape(fits=cost.capacity, cv=CV),
                )


def run(task: Task) -> dict[str, Any]:
    """The figures of one run."""
    workload = draw(task.source, task.requests, task.rate, task.seed, task.shape)
    outcome = simulate(task.setup, task.arm, workload)
    bytes_of = MACHINES[HARDWARE][0].kv_token_bytes
    gigabytes = [tokens * bytes_of / 1e9 for tokens in outcome.moved_tokens]
    ttfo = outcome.first_answer - outcome.arrival
    transfers = outcome.transfers_s
    return {
        "arm": task.arm.name,
        "load": task.load,
        "seed": task.seed,
        "moves": int(np.nansum(outcome.moved)),
        "host_gb": gigabytes[SAME_HOST],
        "rack_gb": gigabytes[SAME_RACK],
        "far_gb": gigabytes[FAR],
        "mean_ttfo": float(np.nanmean(ttfo)),
        "p99_ttfo": float(np.nanpercentile(ttfo, 99)),
        "p99_transfer": float(np.percentile(transfers, 99)) if transfers else None,
    }


FIGURES = {
    "moves": "moves",
    "host_gb": "GB inside hosts",
    "rack_gb": "GB inside racks",
    "far_gb": "GB between racks",
    "mean_ttfo": "mean TTFO",
    "p99_ttfo": "P99 TTFO",
    "p99_transfer": "P99 transfer",
}


def table(rows: Rows) -> list[str]:
    """A line per arm, means over seeds; times in seconds."""
    lines = [
        (arm, *(shown(mean(pick(rows, arm=arm), key)) for key in FIGURES))
        for arm in names(rows, "arm")
    ]
    return lay_out((f"{SOURCE}, load {LOAD:g}, CV {CV:g}", *FIGURES.values()), lines)
