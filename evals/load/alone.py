"""How long one request takes alone: the floor that slowdown is measured from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evals.load.client import Target, replay
from evals.load.items import Item
from evals.load.record import Idle, Record, fit_idle

WARM_UP = Item(arrival_s=0.0, prompt_tokens=24, thinking_tokens=8, answer_tokens=4)
THINKING = (8, 64, 160)
REPEATS = 3
# Other prompts than any run's, so that none of a run is in the prefix cache when it comes.
SEED = 2**20


def warm_up(requests: int, target: Target) -> str | None:
    """Send short requests all at once; the first error, if there is one."""
    errors = (record.error for record in _send([WARM_UP] * requests, target))
    return next((error for error in errors if error is not None), None)


def measure(target: Target) -> Idle | None:
    """Fit TTFO over thinking lengths, one request at a time on a warm server.

    None where fewer than two lengths answered: a model that ends its thinking where it likes may
    always think equally long, or never answer.
    """
    least_s: dict[int, float] = {}
    for _ in range(REPEATS):
        for length in THINKING:
            (record,) = _send([dataclasses.replace(WARM_UP, thinking_tokens=length)], target)
            if record.answer_s:
                # By what was thought, which need not be what was asked for. The least of several:
                # whatever else the machine did only ever adds.
                thought = max(0, record.reasoning_tokens - 1)
                seen = record.answer_s[0] - record.arrival_s
                least_s[thought] = min(seen, least_s.get(thought, seen))
    return fit_idle(list(least_s), list(least_s.values())) if len(least_s) > 1 else None


def _send(items: Sequence[Item], target: Target) -> list[Record]:
    return replay(items, target, seed=SEED).records if items else []
