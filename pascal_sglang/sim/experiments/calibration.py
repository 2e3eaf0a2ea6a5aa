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

import numpy as np

from pascal_sglang.policy import fast_forward
from pascal_sglang.policy.calibration import Calibration
from pascal_sglang.policy.fast_forward import Machine, Present
from pascal_sglang.policy.forecast import Forecaster
from pascal_sglang.policy.forecast_errors import OUTCOMES, WHEN, Estimate
from pascal_sglang.policy.outlook import Outlook
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.arms import Arm
from pascal_sglang.sim.cluster import UNLIMITED, Cluster, Setup
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTask(Task):
    """budgets: share of the requests whose thinking budget says how long they think."""

    budgets: float = 0.0


@dataclass(slots=True, eq=False)
class Watched:
    """An instance's forecaster, what came of its forecasts, who is there, and the last outlook."""

    forecaster: Forecaster
    calibration: Calibration
    here: dict[SimRequest, None] = field(default_factory=dict)
    outlook: Outlook | None = None


class CalibrationCluster(Cluster):
    """A cluster whose instances forecast.

    naive: the same lengths at the speed of a request that runs, as if nothing ever gave way.
    spent_s: processor time that forecasts took; looks: how many, requests: of how many in all.
    """

    def __init__(self, task: CalibrationTask) -> None:
        load = task.workload or draw(task.source, task.requests, task.rate, task.seed, task.shape)
        super().__init__(task.setup, task.arm, load, None)
        self.watched: dict[Instance, Watched] = {}
        for instance in self.instances:
            if not isinstance(instance, PascalInstance):
                raise ValueError(f"arm {task.arm.name}: SGLang's own scheduling is not forecast")
            policy = instance.planner.policy
            forecaster = Forecaster(policy, self.tuning, task.setup.tpot)
            self.watched[instance] = Watched(forecaster, Calibration(errors=forecaster.errors))
        self.naive = Calibration()
        draws = np.random.default_rng([task.seed, 7]).random(len(load))
        self.has_budget = [bool(drawn < task.budgets) for drawn in draws]
        self.until_s = COUNTED * max(load.arrival_s)
        self.spent_s = 0.0
        self.looks = self.requests = 0
        self.clock.at(EVERY_S, self._look)

    def sent(self, instance: Instance, request: SimRequest) -> None:
        watched, now = self.watched[instance], self.clock.now
        watched.forecaster.arrivals.add(now, request.prompt, True)
        watched.here[request] = None
        if watched.outlook is not None and now <= self.until_s:
            arrival = watched.outlook.arrival
            limit = request.reasoning if self.has_budget[request.index] else math.inf
            estimate = arrival.estimate(request.prompt, limit=limit)
            course = arrival.course(request.prompt)
            watched.calibration.forecast(request, now, estimate, course)
        super().sent(instance, request)

    def thought(self, instance: Instance, request: SimRequest) -> bool:
        cut = self.has_budget[request.index]
        forecaster = self.watched[instance].forecaster
        forecaster.ended(request, Phase.REASONING, request.reasoning, cut=cut)
        return super().thought(instance, request)

    def ended(self, instance: Instance, request: SimRequest) -> None:
        watched = self.watched[instance]
        watched.forecaster.ended(request, Phase.ANSWERING, request.answer)
        del watched.here[request]
        for each in (watched.calibration, self.naive):
            each.began(request, request.first_answer, request.reasoning)
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
        present = [
            Present(
                state=r,
                kv_tokens=r.kv_tokens,
                limit=self._limit(r),
                thinks_s=None if r.first_token < 0 else now - r.first_token,
            )
            for r in watched.here
        ]
        forecaster.look(list(watched.here), now, costs)
        forecast = fast_forward.outlook(forecaster, present, machine, instance.pass_info)
        for outlook in forecast:
            watched.outlook = outlook or watched.outlook
        self.spent_s += time.process_time() - began
        self.looks += 1
        self.requests += len(present)
        assert watched.outlook is not None
        if now > self.until_s:
            return
        for state, estimate in watched.outlook.requests.items():
            assert isinstance(state, SimRequest)
            course = watched.outlook.courses[state]
            watched.calibration.forecast(state, now, estimate, course)
            lengths = forecaster.lengths(state.phase_tokens, self._limit(state))
            left = [tokens - state.phase_tokens for tokens in lengths]
            alone = Estimate(*(forecaster.token_s * tokens for tokens in left))
            self.naive.forecast(state, now, alone, course)

    def _limit(self, request: SimRequest) -> int:
        """The most tokens that are known to come in this phase."""
        if request.phase is not Phase.REASONING or not self.has_budget[request.index]:
            return UNLIMITED
        return request.reasoning - request.phase_tokens

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """As `Calibration.counts`, of all instances."""
        found = {when: Counter[str]() for when in WHEN}
        for watched in self.watched.values():
            for when, counts in watched.calibration.counts.items():
                found[when].update(counts)
        return found


def tasks(
    source: str,
    hardware: str,
    instances: int,
    arm: Arm,
    seeds: int,
    requests: int,
    budgets: float = 0.0,
    burst_s: tuple[float, float] | None = None,
) -> list[CalibrationTask]:
    """Every seed under every one of the loads of the paper. burst_s: see `workload.Shape`."""
    setup = Setup(cost=PRESETS[hardware], instances=instances)
    return [
        CalibrationTask(
            budgets=budgets,
            setup=setup,
            arm=arm,
            source=source,
            load=f"load {load:g}",
            rate=paper.rate(source, load, setup),
            requests=requests,
            seed=seed,
            shape=Shape(fits=setup.cost.capacity, burst_s=burst_s),
        )
        for load in paper.LOADS.values()
        for seed in range(seeds)
    ]


def calibrate(task: Task) -> dict[str, Any]:
    """What came of the forecasts of one run, by when they were made, and what they took. task: a
    `CalibrationTask`."""
    assert isinstance(task, CalibrationTask)
    cluster = CalibrationCluster(task)
    cluster.run()
    return {
        "arm": task.arm.name,
        "source": task.scenario or task.source,
        "load": task.load,
        "seed": task.seed,
        "ms_per_forecast": 1e3 * cluster.spent_s / max(1, cluster.looks),
        "requests_per_forecast": cluster.requests / max(1, cluster.looks),
        "outcomes": {when: dict(counts) for when, counts in cluster.counts.items()},
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
