"""What an instance tells the controller about itself: a few numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One instance now. Names and meaning of the figures: `policy.placement.Instance`.

    received: requests it has taken in since it started, so that the controller knows which of its
    dispatches are counted here already.
    """

    dp_rank: int
    received: int
    on_pace: bool
    footprint: int
    thinking: int
    fresh: int
    free: int
    waiting: int
    capacity: int
    load: int
    pass_us: int
    batch: int
    prefill_ns: int
