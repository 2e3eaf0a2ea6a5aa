"""Passes as the executor counts and measures them, many at a time."""

from __future__ import annotations

from pascal_sglang.policy.running_mean import KEEP, LONGEST_PASS_S


class Passes:
    """count: passes so far. mean_s: the running mean of their length, in seconds. mean_batch: the
    same of the requests that decoded in them."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_s = 0.0
        self.mean_batch = 0.0

    def add(self, count: int, batch: int, last_s: float, growth_s: float = 0.0) -> None:
        """`count` passes with `batch` requests have ended; the last took `last_s`, each `growth_s`
        more than the one before. The same as adding them one by one."""
        self.count += count
        if last_s >= LONGEST_PASS_S:
            return
        kept = KEEP**count
        self.mean_batch = kept * self.mean_batch + (1 - kept) * batch
        # Sum of j * KEEP**j for j below `count`.
        behind = KEEP * (1 - count * kept / KEEP + (count - 1) * kept) / (1 - KEEP) ** 2
        self.mean_s = kept * self.mean_s + (1 - kept) * last_s - (1 - KEEP) * growth_s * behind
