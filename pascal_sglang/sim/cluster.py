"""A cluster under one arm and one workload, from the first arrival to the last token."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pascal_sglang.policy.kv_tier import TYPICAL_QUANTA
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.placement import Answer
from pascal_sglang.policy.rank_forecast import RankForecast
from pascal_sglang.policy.ranking import Tuning
from pascal_sglang.policy.request import Reader
from pascal_sglang.policy.running_mean import running_mean
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.arms import Arm
from pascal_sglang.sim.checks import Books
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.controller import Controller
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.migration import Migration, Migrations, Network
from pascal_sglang.sim.outcome import Outcome
from pascal_sglang.sim.pascal_instance import PascalInstance, costs_of
from pascal_sglang.sim.request import SimRequest
from pascal_sglang.sim.stock_instance import StockInstance
from pascal_sglang.sim.topology import Topology
from pascal_sglang.sim.workload import Workload

Progress = Callable[[int], None]
REPORT_EVERY = 100
UNLIMITED = 1 << 30
# KV tokens of an instance without a limit.
UNLIMITED_KV = 1 << 40
# Passes that a move takes besides those of its transfer (`engine.migration`).
MOVE_PASSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all arms of a comparison share.

    tpot: the reader's pace, seconds per token. slo: the QoE below which an answer violates its
    objective. knows_lengths: requests say how much they will generate. quantum, demote: tokens.
    topology: where the instances are; None: all are equally near, and linked as `Cost` says.
    step_by_step: decide in every pass instead of jumping (slow; for tests).
    """

    cost: Cost
    instances: int = 8
    tpot: float = 0.1
    slo: float = 0.95
    knows_lengths: bool = False
    quantum: int = 500
    demote: int = 5000
    topology: Topology | None = None
    step_by_step: bool = False


def simulate(
    setup: Setup, arm: Arm, workload: Workload, progress: Progress | None = None
) -> Outcome:
    """Run everything and check the books. Raises RuntimeError where they do not balance, and
    ValueError for a request that fits no instance."""
    collecting = gc.isenabled()
    gc.disable()  # Nothing here is cyclic for long, and there are millions of objects.
    try:
        return Cluster(setup, arm, workload, progress).run()
    finally:
        if collecting:
            gc.enable()


class Cluster:
    """Instances, a controller, and the network between them."""

    def __init__(
        self, setup: Setup, arm: Arm, workload: Workload, progress: Progress | None
    ) -> None:
        self.setup = setup
        self.arm = arm
        self.workload = workload
        self.progress = progress
        self.clock = Clock()
        numbers: dict[str, Any] = {"quantum": setup.quantum, "demote": setup.demote}
        self.cost = (
            dataclasses.replace(setup.cost, capacity=UNLIMITED_KV) if arm.unlimited else setup.cost
        )
        if stall_s := costs_of(setup.cost).stall_s(TYPICAL_QUANTA * setup.quantum):
            numbers["stall_s"] = stall_s
        self.tuning = Tuning(**(numbers | dict(arm.tuning)))
        # The policy that goes by priorities, if the load has any and the arm does.
        self.prioritised = arm.prioritised if any(workload.interactive) else None
        self.tells_tenants = arm.fairness and bool(workload.tenant)
        self.instances = [self._instance(index) for index in range(setup.instances)]
        self.controller = Controller(arm, self.clock, self.instances, setup.quantum, setup.topology)
        self.migrations = Migrations(
            self.clock,
            Network(setup.cost, setup.instances, setup.topology),
            self._migrated,
            refusable=arm.migration != "always",
        )
        self.outcome = Outcome.empty(len(workload))
        self.books = Books(workload)
        # Running mean per instance of the answers that ended there, in tokens.
        self._answers: list[float | None] = [None] * setup.instances
        self._arrived = 0
        self._order = sorted(
            (i for i in range(len(workload)) if i not in workload.later),
            key=workload.arrival_s.__getitem__,
        )

    def _instance(self, index: int) -> Instance:
        setup, arm = self.setup, self.arm
        record = arm.record if self.prioritised is None else self.prioritised
        shared: dict[str, Any] = {
            "tuning": self.tuning,
            "forecast": RankForecast() if record is None else record.forecast,
            "readers_sticky": arm.sticky,
            "slo": setup.slo,
            "tpot": setup.tpot,
            "step_by_step": setup.step_by_step,
            "knows_lengths": setup.knows_lengths,
        }
        if record is None:
            return StockInstance(index, self.cost, self.clock, self, **shared)
        fair = self.tells_tenants
        return PascalInstance(
            index, self.cost, self.clock, self, policy=record, fair=fair, **shared
        )

    def run(self) -> Outcome:
        self._next_arrival()
        began = time.perf_counter()
        self.clock.run()
        outcome = self.outcome
        outcome.wall_s = time.perf_counter() - began
        outcome.events = self.clock.happened
        outcome.end_s = self.clock.now
        outcome.transfers_s = self.migrations.transfers
        outcome.refused_migrations = self.migrations.refused
        outcome.moved_tokens = self.migrations.network.sent_tokens
        outcome.take_in(self.instances)
        self.books.close(self.instances, self.migrations.under_way)
        return outcome

    def _next_arrival(self) -> None:
        if self._arrived < len(self._order):
            index = self._order[self._arrived]
            self._arrived += 1
            self.clock.at(self.workload.arrival_s[index], self._arrive, index)

    def _arrive(self, index: int) -> None:
        load, now = self.workload, self.clock.now
        prompt, reasoning, answer = load.prompt[index], load.thinking[index] + 1, load.answer[index]
        if prompt + reasoning + answer > self.setup.cost.capacity:
            raise ValueError(
                f"request {index} needs {prompt + reasoning + answer} tokens of KV, more than the "
                f"{self.setup.cost.capacity} of an instance"
            )
        request = SimRequest(
            seq=self.books.opened + 1,
            pacer=Pacer(self.setup.tpot),
            index=index,
            arrival=now,
            prompt=prompt,
            reasoning=reasoning,
            answer=answer,
            remaining=UNLIMITED,
            talk=load.talk[index] if load.talk else -1,
            history=load.history[index] if load.history else 0,
            reader=Reader.PROGRAM if load.program and load.program[index] else Reader.HUMAN,
            tenant=str(load.tenant[index]) if self.tells_tenants else "",
            priority=0 if self.prioritised is None or load.interactive[index] else 1,
        )
        self.books.opens(request)
        self.sent(self.instances[self.controller.place(prompt, request.talk)], request)
        if index not in load.later:
            self._next_arrival()

    def sent(self, instance: Instance, request: SimRequest) -> None:
        """A request comes to its instance."""
        instance.arrive(request)

    def thought(self, instance: Instance, request: SimRequest) -> bool:
        """Algorithm 2, or ours; whether the request stops here."""
        if self.arm.migration == "off":
            return False
        assert isinstance(instance, PascalInstance)
        remaining = request.left if self.setup.knows_lengths else UNLIMITED
        mean = self._answers[instance.index]
        likely = remaining if mean is None else min(remaining, int(mean))
        cost = self.setup.cost
        topology = self.setup.topology
        token_s = cost.migration_token_s if topology is None else topology.slowest_token_s
        passes = MOVE_PASSES + int(request.held * token_s / cost.decode(1, request.held))
        answer = Answer(instance.index, request.held, remaining, likely, passes)
        decision = self.controller.at_boundary(answer)
        self.outcome.decisions[decision.why] += 1
        if decision.target == instance.index:
            return False
        target = self.instances[decision.target]
        assert isinstance(target, PascalInstance)
        self.migrations.begin(request, instance, target, live=self.arm.live)
        return not self.arm.live

    def _migrated(self, migration: Migration, done: bool) -> None:
        views = self.controller.views
        source, target = views[migration.source.index], views[migration.target.index]
        self.controller.placement.moved(source, target, migration.claimed, done=done)

    def ended(self, instance: Instance, request: SimRequest) -> None:
        now, load = self.clock.now, self.workload
        request.phase, request.migration = Phase.FINISHED, None
        self.books.closes(request)
        self.outcome.note(request, now, instance.index)
        mean = self._answers[instance.index]
        self._answers[instance.index] = running_mean(mean, request.answer)
        follows = load.follows[request.index] if load.follows else -1
        if follows >= 0:
            instance.memory.remember(request.talk, request.held)
            self.clock.at(now + load.pause_s[follows], self._arrive, follows)
        if self.progress is not None and self.books.closed % REPORT_EVERY == 0:
            self.progress(self.books.closed)
