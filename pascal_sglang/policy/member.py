"""What the policy knows of one request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.timeline import Phase


class Place(Enum):
    """Where a request and its KV are."""

    WAITING = "waiting"  # no KV yet, or dropped for recompute: has to be prefilled
    RUNNING = "running"  # decodes in every step
    HOST = "host"  # paused, KV in host memory


@dataclass(slots=True, eq=False)
class Member:
    """One request. The adapter keeps it true; the policy keeps `credit` and the pass numbers.

    seq: order of arrival, unique.
    phase_tokens: tokens generated in the current phase; the quantum counts these.
    total_tokens: tokens generated in all.
    kv_tokens: KV entries it holds, or needs back to resume, or needs to be prefilled.
    pausable: False for what the engine cannot pause; it runs on as in stock SGLang.
    since_pass: the pass in which it entered its current place.
    credit: quanta forgiven for having waited; lasts until it has run a quantum.
    handle: the adapter's own object.
    ticket: which of its entries in a `Line` is the true one.
    """

    seq: int
    pacer: Pacer
    place: Place = Place.WAITING
    phase: Phase = Phase.REASONING
    phase_tokens: int = 0
    total_tokens: int = 0
    kv_tokens: int = 0
    pausable: bool = True
    since_pass: int = 0
    credit: int = 0
    ran_from: int = 0
    handle: Any = None
    ticket: int = 0

    def enter(self, place: Place, pass_no: int) -> None:
        """Change place; waiting starts anew, and so does the count of what it runs."""
        self.place = place
        self.since_pass = pass_no
        if place is Place.RUNNING:
            self.ran_from = self.total_tokens
