"""Pauses and holds back at random, on top of the plan: for tests that must survive it."""

from __future__ import annotations

import random

from pascal_sglang.policy.kv_tier import KVTier


class Chaos:
    """Seeded alike on every rank. `chance`: how often something happens, per request and pass."""

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self._dice = random.Random(0)

    def strikes(self) -> bool:
        return self._dice.random() < self.chance

    def defers(self) -> bool:
        """Whether copies begun in this pass are waited for in the next one."""
        return self._dice.random() < 0.5

    def tier(self, *, recomputes: bool) -> KVTier:
        return self._dice.choice([t for t in KVTier if recomputes or t is not KVTier.RECOMPUTE])
