"""Whether forecasts of the time to an answer hold: what share of answers begins inside their range.

Every instance learns and forecasts by itself, as it does in a server: it looks every `EVERY_S`
seconds, and a request's range is that of the first look in each stretch of its thinking.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pascal_sglang.policy.forecast import (
    OUTCOMES,
    WHEN,
    Calibration,
    Estimate,
    Forecaster,
    Machine,
    Outlook,
    Present,
)
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.arms import Arm
from pascal_sglang.sim.cluster import Cluster, Setup
from pascal_sglang.sim.experiments import paper
from pascal_sglang.sim.experiments.runs import Task
from pascal_sglang.sim.experiments.tables import lay_out
from pascal_sglang.sim.hardware import PRESETS
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.pascal_instance import PascalInstance
from pascal_sglang.sim.request import SimRequest
from pascal_sglang.sim.workload import Shape, draw

EVERY_S = 5.0
# Forecasts of this part of the arrivals count: later ones expect a load that ends.
COUNTED = 0.75


@dataclass(slots=True, eq=False)
class Watched:
    """An instance's forecaster, who is there, and the last outlook."""

    forecaster: Forecaster
    here: dict[SimRequest, None] = field(default_factory=dict)
    outlook: Outlook | None = None


class CalibrationCluster(Cluster):
    """A cluster whose instances forecast.

    naive: the same lengths at the speed of a request that runs, as if nothing ever gave way.
    spent_s: processor time that forecasts took; looks: how many, requests: of how many in all.
    """

    def __init__(self, task: Task) -> None:
        load = task.workload or draw(task.source, task.requests, task.rate, task.seed, task.shape)
        super().__init__(task.setup, task.arm, load, None)
        self.watched: dict[Instance, Watched] = {}
        for instance in self.instances:
            if not isinstance(instance, PascalInstance):
                raise ValueError(f"arm {task.arm.name}: SGLang's own scheduling is not forecast")
            policy = instance.planner.policy
            self.watched[instance] = Watched(Forecaster(policy, self.tuning, task.setup.tpot))
        self.calibration, self.naive = Calibration(), Calibration()
        self.until_s = COUNTED * max(load.arrival_s)
        self.spent_s = 0.0
        self.looks = self.requests = 0
        self.clock.at(EVERY_S, self._look)

    def sent(self, instance: Instance, request: SimRequest) -> None:
        watched, now = self.watched[instance], self.clock.now
        watched.forecaster.arrivals.add(now, request.prompt, True)
        watched.here[request] = None
        if watched.outlook is not None and now <= self.until_s:
            estimate = watched.outlook.arrival.estimate(request.prompt)
            self.calibration.arrived(request, now, estimate)
        super().sent(instance, request)

    def thought(self, instance: Instance, request: SimRequest) -> bool:
        self.watched[instance].forecaster.ended(request, Phase.REASONING, request.reasoning)
        return super().thought(instance, request)

    def ended(self, instance: Instance, request: SimRequest) -> None:
        watched = self.watched[instance]
        watched.forecaster.ended(request, Phase.ANSWERING, request.answer)
        del watched.here[request]
        for each in (self.calibration, self.naive):
            each.began(request, request.first_answer)
        super().ended(instance, request)

    def _look(self, _: object) -> None:
        for instance, watched in self.watched.items():
            if watched.here:
                assert isinstance(instance, PascalInstance)
                self._look_at(instance, watched)
        if self.books.closed < len(self.workload):
            self.clock.at(self.clock.now + EVERY_S, self._look)

    def _look_at(self, instance: PascalInstance, watched: Watched) -> None:
        instance.catch_up()
        for request in list(instance.batch):
            request.kv_tokens = request.held
        now, costs = self.clock.now, instance.costs
        machine = Machine(
            capacity=self.cost.capacity,
            slots=self.cost.slots,
            prefill_token_s=costs.prefill_token_s or 0.0,
        )
        began = time.process_time()
        forecaster = watched.forecaster
        present = [Present(state=r, kv_tokens=r.kv_tokens) for r in watched.here]
        forecaster.look(list(watched.here), now)
        for outlook in forecaster.outlook(present, machine, instance.pass_info):
            watched.outlook = outlook or watched.outlook
        self.spent_s += time.process_time() - began
        self.looks += 1
        self.requests += len(present)
        assert watched.outlook is not None
        if now > self.until_s:
            return
        for state, estimate in watched.outlook.requests.items():
            assert isinstance(state, SimRequest)
            began_s = None if state.first_token < 0 else state.first_token
            self.calibration.forecast(state, now, began_s, estimate)
            left = forecaster.tokens_left(state.phase_tokens, math.inf)
            alone = Estimate(*(forecaster.token_s * tokens for tokens in left))
            self.naive.forecast(state, now, began_s, alone)


def tasks(
    source: str, hardware: str, instances: int, arm: Arm, seeds: int, requests: int
) -> list[Task]:
    """Every seed under every one of the loads of the paper."""
    setup = Setup(cost=PRESETS[hardware], instances=instances)
    return [
        Task(
            setup=setup,
            arm=arm,
            source=source,
            load=f"load {load:g}",
            rate=paper.rate(source, load, setup),
            requests=requests,
            seed=seed,
            shape=Shape(fits=setup.cost.capacity),
        )
        for load in paper.LOADS.values()
        for seed in range(seeds)
    ]


def calibrate(task: Task) -> dict[str, Any]:
    """What came of the forecasts of one run, by when they were made, and what they took."""
    cluster = CalibrationCluster(task)
    cluster.run()
    return {
        "arm": task.arm.name,
        "source": task.scenario or task.source,
        "load": task.load,
        "seed": task.seed,
        "ms_per_forecast": 1e3 * cluster.spent_s / max(1, cluster.looks),
        "requests_per_forecast": cluster.requests / max(1, cluster.looks),
        "outcomes": {when: dict(counts) for when, counts in cluster.calibration.counts.items()},
        "naive": {when: dict(counts) for when, counts in cluster.naive.counts.items()},
    }


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table per source, load and arm: all seeds together."""
    lines: list[str] = []
    keys = ("source", "load", "arm")
    for which in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in keys) == which]
        lines += ["", f"== {', '.join(which)}: {len(mine)} seeds"]
        table = []
        for when in WHEN:
            shares = _shares(mine, "outcomes", when, (*OUTCOMES, "by_p50"))
            if shares:
                naive = _shares(mine, "naive", when, ("inside",)) or ["", "-"]
                table.append((when, *shares, naive[-1]))
        head = ("forecast", "answers", *(f"{o} %" for o in OUTCOMES), "by P50 %", "naive inside %")
        lines += lay_out(head, table)
        cost = sum(row["ms_per_forecast"] for row in mine) / len(mine)
        among = sum(row["requests_per_forecast"] for row in mine) / len(mine)
        lines.append(f"a forecast of {among:.0f} requests takes {cost:.1f} ms")
    return lines


def _shares(
    rows: Sequence[dict[str, Any]], which: str, when: str, keys: Sequence[str]
) -> list[str]:
    """How many forecasts were made then, and the percentages that came out so; empty if none."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row[which][when])
    count = sum(counts[outcome] for outcome in OUTCOMES)
    return [str(count), *(f"{100 * counts[key] / count:.1f}" for key in keys)] if count else []
