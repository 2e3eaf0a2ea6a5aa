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


class Reader(Enum):
    """Who reads an answer."""

    HUMAN = "human"  # token by token, at a pace: ahead of it, the answer can wait
    PROGRAM = "program"  # once it is whole, and so wants it soon


@dataclass(slots=True, eq=False)
class RequestState:
    """One request. The engine, or the simulator, keeps it true."""

    # Order of arrival, unique.
    seq: int
    pacer: Pacer
    status: RequestStatus = RequestStatus.WAITING
    phase: Phase = Phase.REASONING
    # Tokens generated in the current phase, which the quantum counts, and in all.
    phase_tokens: int = 0
    total_tokens: int = 0
    # KV entries that the request holds, or needs back to resume, or needs to be prefilled. True
    # only while it does not run, and so is `remaining`.
    kv_tokens: int = 0
    # The most tokens it may still produce in this phase, as far as limits say.
    remaining: int = 1 << 30
    # False: the engine cannot pause the request. It runs on as in stock SGLang.
    pausable: bool = True
    # False: a pause drops its KV, and a prefill makes it again.
    keeps_kv: bool = True
    # False: a pause keeps its KV, on the device where host memory has no room. It is dropped and
    # prefilled again only where SGLang would have to do that with a running request.
    recomputes: bool = True
    # The pass, and its time in seconds, in which the request entered its current status.
    since_pass: int = 0
    since: float = 0.0
    # Passes that it counts as having waited longer, for a prefix that the device holds already.
    head_start: int = 0
    # Quanta forgiven for waiting; they last until the request has run a quantum.
    credit: int = 0
    # `total_tokens` when it began to run.
    ran_from: int = 0
    reader: Reader = Reader.HUMAN
    # Lower goes first; all have the same where SGLang's priorities are off.
    priority: int = 0
    # Whom its KV is charged to, where tenants are told apart (`policy.fairness`).
    tenant: str = ""
    # No user waits for it: it is planned for like any other, and counted nowhere.
    internal: bool = False
    # The engine's own object.
    handle: Any = None
    # Which of its entries in the `WaitQueue` is the true one, and the class of that entry.
    ticket: int = 0
    priority_class: int = 0

    def enter(self, status: RequestStatus, pass_no: int, now: float) -> None:
        """Change status. Waiting starts anew, and so does the count of what the request runs."""
        self.status = status
        self.since_pass = pass_no
        self.since = now
        if status is RequestStatus.RUNNING:
            self.ran_from = self.total_tokens
            self.head_start = 0
