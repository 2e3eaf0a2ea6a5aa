"""How many turns conversations have."""

from __future__ import annotations

import numpy as np


def sizes(rng: np.random.Generator, requests: int, mean_turns: float) -> list[int]:
    """Turns per conversation, geometric with this mean, until there are `requests` of them; the
    last conversation is cut short."""
    found: list[int] = []
    while requests:
        found.append(min(int(rng.geometric(1 / mean_turns)), requests))
        requests -= found[-1]
    return found
