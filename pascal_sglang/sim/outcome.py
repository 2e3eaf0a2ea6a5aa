"""What one run gave, a row per request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pascal_sglang.sim.instance import Instance
from pascal_sglang.sim.loads.lengths import Floats
from pascal_sglang.sim.pascal_instance import PascalInstance
from pascal_sglang.sim.request import SimRequest
from pascal_sglang.sim.stock_instance import StockInstance


@dataclass(slots=True)
class Outcome:
    """Columns by request; seconds of simulated time unless said otherwise.

    decisions: of migration, by reason. pauses: by tier. transfers_s: of the KV of moves, of which
    moved_tokens went, by distance (`policy.site`).
    wall_s, events: what the run itself took.
    """

    arrival: Floats
    first_token: Floats
    reasoning_end: Floats
    first_answer: Floats
    finished: Floats
    qoe: Floats
    pauses: Floats
    moved: Floats
    instance: Floats
    decisions: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    transfers_s: list[float] = field(default_factory=list)
    refused_migrations: int = 0
    moved_tokens: list[int] = field(default_factory=lambda: [0, 0, 0])
    tokens: int = 0
    recomputed_tokens: int = 0
    copied_tokens: int = 0
    busy_s: float = 0.0
    most_held: float = 0.0
    end_s: float = 0.0
    events: int = 0
    wall_s: float = 0.0

    @classmethod
    def empty(cls, requests: int) -> Outcome:
        def column() -> Floats:
            return np.full(requests, np.nan)

        return cls(
            arrival=column(),
            first_token=column(),
            reasoning_end=column(),
            first_answer=column(),
            finished=column(),
            qoe=column(),
            pauses=column(),
            moved=column(),
            instance=column(),
        )

    def note(self, request: SimRequest, now: float, instance: int) -> None:
        """A request has ended."""
        i = request.index
        self.arrival[i] = request.arrival
        self.first_token[i] = request.first_token
        self.reasoning_end[i] = request.reasoning_end
        self.first_answer[i] = request.first_answer
        self.finished[i] = now
        self.qoe[i] = request.pacer.qoe
        self.pauses[i] = request.pauses
        self.moved[i] = request.moved
        self.instance[i] = instance

    def take_in(self, instances: Sequence[Instance]) -> None:
        """Add up what the instances counted."""
        for each in instances:
            self.tokens += each.tokens
            self.recomputed_tokens += each.recomputed_tokens
            self.copied_tokens += each.memory.copied_in + each.memory.copied_out
            self.busy_s += each.busy_s
            share = each.memory.most_held / each.memory.capacity
            self.most_held = max(self.most_held, share)
            if isinstance(each, PascalInstance):
                for tier, count in each.pauses.items():
                    self.tiers[tier.value] += count
            if isinstance(each, StockInstance):
                self.tiers["retracted"] += each.retracted
