"""The body of a request to a route of ours: a JSON object that says every field once."""

from __future__ import annotations

import json
from typing import Any


def object_in(body: bytes) -> dict[str, Any]:
    """Raises: ValueError with one line for anything else."""
    try:
        found = json.loads(body, object_pairs_hook=_each_once)
    except _Twice as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("the body must be a JSON object")
    return found


class _Twice(ValueError):
    """An object has a field twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(f"the body has {name!a:.60} twice")
        found[name] = value
    return found
