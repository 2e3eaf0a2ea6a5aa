"""How evenly the instances of a server share the work: their KV in use, asked for while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from evals.load import remote

EVERY_S = 0.25


@dataclass(slots=True)
class Balance:
    """samples: shares of KV in use, from 0 to 1, one per instance, at even times."""

    samples: list[list[float]] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """`kv_imbalance`: the share of its KV that the fullest instance has in use, less that of
        the emptiest, on average over the times at which anybody had some; None for one instance."""
        apart = [max(s) - min(s) for s in self.samples if len(s) > 1 and max(s) > 0]
        return {"kv_imbalance": sum(apart) / len(apart) if apart else None}


def shares(told: str | None) -> list[float]:
    """From the body of `GET /v1/loads`; empty if that is not what it is."""
    try:
        loads: Sequence[dict[str, Any]] = json.loads(told or "")["loads"]
        return [load["num_used_tokens"] / load["max_total_num_tokens"] for load in loads]
    except (ValueError, LookupError, TypeError, ZeroDivisionError):
        return []


@contextmanager
def watching(base_url: str) -> Iterator[Balance]:
    """Ask the server every `EVERY_S` seconds; one with a single instance is asked once."""
    balance, over = Balance(), threading.Event()

    def ask() -> None:
        while True:
            now = shares(remote.get(base_url, "/v1/loads?include=core"))
            if len(now) == 1:
                return
            balance.samples.append(now)
            if over.wait(EVERY_S):
                return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield balance
    finally:
        over.set()
        asking.join(timeout=remote.TIMEOUT_S + 1)
