"""What the policy knows of one request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.timeline import Phase


class RequestStatus(Enum):
    """Where a request and its KV are."""

    WAITING = "waiting"  # no KV yet, or dropped for recompute: has to be prefilled
    RUNNING = "running"  # decodes in every step
    RESIDENT = "resident"  # paused, KV still on the device
    HOST = "host"  # paused, KV in host memory


@dataclass(slots=True, eq=False)
class RequestState:
    """One request. The adapter keeps it true; the policy keeps `credit` and the pass numbers.

    seq: order of arrival, unique.
    phase_tokens: tokens generated in the current phase; the quantum counts these.
    total_tokens: tokens generated in all.
    kv_tokens: KV entries it holds, or needs back to resume, or needs to be prefilled. The engine
        keeps this and `remaining` true only for those who do not run.
    remaining: the most tokens it may still produce in this phase, as far as limits say; the
        default stands for no known limit.
    pausable: False for what the engine cannot pause; it runs on as in stock SGLang.
    since_pass: the pass in which it entered its current place.
    since: the time (s) of that pass.
    head_start: passes it counts as having waited longer, for a prefix the device already holds.
    credit: quanta forgiven for having waited; lasts until it has run a quantum.
    internal: no user waits for it; it is planned for like any other, and nowhere counted.
    handle: the adapter's own object.
    ticket: which of its entries in a `Line` is the true one.
    lane: the lane of that entry.
    """

    seq: int
    pacer: Pacer
    status: RequestStatus = RequestStatus.WAITING
    phase: Phase = Phase.REASONING
    phase_tokens: int = 0
    total_tokens: int = 0
    kv_tokens: int = 0
    remaining: int = 1 << 30
    pausable: bool = True
    since_pass: int = 0
    since: float = 0.0
    head_start: int = 0
    credit: int = 0
    ran_from: int = 0
    internal: bool = False
    handle: Any = None
    ticket: int = 0
    priority_class: int = 0

    def enter(self, status: RequestStatus, pass_no: int, now: float) -> None:
        """Change place; waiting starts anew, and so does the count of what it runs."""
        self.status = status
        self.since_pass = pass_no
        self.since = now
        if status is RequestStatus.RUNNING:
            self.ran_from = self.total_tokens
            self.head_start = 0
