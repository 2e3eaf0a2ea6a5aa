"""What a request may say about its own scheduling, in `custom_params["pascal"]`."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

# Milliseconds per answering token that a request may ask for, both included. Nobody reads faster,
# and what `--pascal-pace-stream` holds back at most (1,024 tokens) leaves within three hours.
ASKED_TPOT_MS = (1.0, 10_000.0)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is a number that can be compared; not `True`, and not NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value))


def asked_tpot_ms(custom_params: object) -> object:
    """What the request asks for as `answer_tpot_ms`, whatever it is; None if it says nothing."""
    own = custom_params.get("pascal") if isinstance(custom_params, dict) else None
    return own.get("answer_tpot_ms") if isinstance(own, dict) else None


def problem_with(sampling_params: Any) -> str | None:
    """What is wrong with the sampling parameters of a request, or of all requests of a batch, as
    far as they are ours; None if nothing is."""
    low, high = ASKED_TPOT_MS
    each = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    for params in each:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        own = custom.get("pascal") if isinstance(custom, dict) else None
        if own is not None and not isinstance(own, dict):
            return f"custom_params.pascal must be an object, not {own!r:.40}"
        asked = asked_tpot_ms(custom)
        if asked is not None and not (is_number(asked) and low <= asked <= high):
            return (
                "custom_params.pascal.answer_tpot_ms must be a number of milliseconds from "
                f"{low:g} to {high:g}, not {asked!r:.40}"
            )
    return None
