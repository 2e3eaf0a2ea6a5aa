"""The running mean that the engine and the simulator keep of lengths of passes and of answers."""

from __future__ import annotations

# Shares of the mean so far and of the new value.
KEEP, ADD = 0.9, 0.1
# A pass of a busy engine takes less than this; a longer one, in seconds, is left out of the means.
LONGEST_PASS_S = 1.0


def running_mean(before: float | None, value: float) -> float:
    """The mean with one more value; `before` is None for the first."""
    return value if before is None else KEEP * before + ADD * value
