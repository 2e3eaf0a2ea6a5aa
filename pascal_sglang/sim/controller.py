"""The controller: what it knows of instances, and `policy.placement` deciding on that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from pascal_sglang.policy.placement import FIGURES, Answer, Decision, LoadFigures, Placement
from pascal_sglang.policy.placement import Instance as InstanceLoad
from pascal_sglang.sim.arms import Arm
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.topology import Topology

# How often a busy instance says how it is (`engine.load_reporter`), in seconds.
STATUS_S = 0.02
figures_of: Callable[[LoadFigures], tuple[object, ...]] = attrgetter(*FIGURES)


class Controller:
    """Hears from an instance at most every `STATUS_S`, when it is about to decide on it."""

    def __init__(
        self,
        arm: Arm,
        clock: Clock,
        instances: Sequence[Instance],
        quantum: int,
        topology: Topology | None = None,
    ) -> None:
        self.arm = arm
        self.clock = clock
        self.instances = instances
        self.views = [InstanceLoad(index) for index in range(len(instances))]
        if topology is not None:
            for view in self.views:
                view.site = topology.site(view.index)
        self.placement = Placement(
            quantum=quantum,
            lazy=arm.lazy,
            adaptive=arm.migration == "adaptive",
            predict=arm.predict,
            near=arm.near,
        )
        self.placed = [0] * len(instances)
        self.homes: dict[int, tuple[int, int]] = {}
        self._heard = [-STATUS_S] * len(instances)
        self._said = [figures_of(view) for view in self.views]

    def place(self, prompt: int, talk: int) -> int:
        """The instance for a new request with a prompt of so many tokens."""
        hits: Mapping[int, int] = {}
        if self.arm.prefixes and talk in self.homes:
            home, tokens = self.homes[talk]
            hits = {home: tokens}
        candidates = self.placement.in_sight(self.views, hits)
        for view in candidates:
            self._hear(view)
        chosen = self.placement.place(candidates, prompt, hits)
        self.placed[chosen] += 1
        if talk >= 0:
            self.homes[talk] = (chosen, prompt)
        return chosen

    def at_boundary(self, answer: Answer) -> Decision:
        """Whether a request whose thinking has ended moves, and where."""
        here = self.views[answer.current]
        candidates = self.placement.in_sight(self.views, (answer.current,), here)
        for view in candidates:
            self._hear(view)
        return self.placement.at_boundary(candidates, answer)

    def _hear(self, view: InstanceLoad) -> None:
        index = view.index
        instance = self.instances[index]
        if self.clock.now - self._heard[index] < STATUS_S:
            if not self.arm.optimistic:
                self._recall(view)
            return
        self._heard[index] = self.clock.now
        instance.catch_up()
        on_pace = not self.arm.on_pace or instance.readers.on_pace(self.clock.now)
        self._said[index] = figures_of(load_of(instance, on_pace=on_pace))
        self._recall(view)

    def _recall(self, view: InstanceLoad) -> None:
        """Know what the last status said, and nothing that was decided since."""
        for name, value in zip(FIGURES, self._said[view.index], strict=True):
            setattr(view, name, value)


def load_of(instance: Instance, *, on_pace: bool) -> LoadFigures:
    """What an instance that is up to date says of itself."""
    thinking, others, tokens = instance.waiting()
    memory, passes = instance.memory, instance.passes
    return LoadFigures(
        on_pace=on_pace,
        footprint=memory.held + memory.host,
        reasoning=len(instance.thinking) + thinking,
        fresh=len(instance.fresh),
        free=memory.free,
        waiting=tokens,
        capacity=memory.capacity,
        load=len(instance.batch) + others,
        pass_us=round(1e6 * passes.mean_s),
        batch=round(passes.mean_batch),
        prefill_ns=round(1e9 * instance.prefill_token_s),
    )
