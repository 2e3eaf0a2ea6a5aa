"""What the client notes of one request, and of a server without load. Times in seconds.

A break is a time in which a running request got no step, as the server tells: `paused` or `moved`.
Only our servers tell, for every instance at `/pascal/status`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
import numpy as np

from evals.workload import Item

TIMEOUT = aiohttp.ClientTimeout(total=10)


class Break(NamedTuple):
    """kind: `paused` or `moved`. start_s, end_s: seconds after the request came to the server."""

    kind: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Record:
    """What the client saw of one request, in seconds after the run's start.

    arrival_s: when it was due; latencies count from here, so a late client cannot hide.
    reasoning_tokens: the server's count, the end-of-thinking token included.
    breaks: None where nobody asked or the server did not tell.
    """

    arrival_s: float
    sent_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    reasoning_tokens: int = 0
    finished: bool = False
    error: str | None = None
    breaks: list[Break] | None = None

    @property
    def answer_s(self) -> list[float]:
        return self.token_s[self.reasoning_tokens :]

    @property
    def blocking_s(self) -> float | None:
        """End of thinking to the first answering token; None without either."""
        if not self.answer_s or not self.reasoning_tokens:
            return None
        return self.answer_s[0] - self.token_s[self.reasoning_tokens - 1]


@dataclass(frozen=True, slots=True)
class Idle:
    """TTFO of a request alone on an idle server: `t0_s + thinking_tokens * per_token_s`."""

    t0_s: float
    per_token_s: float

    def ttfo_s(self, item: Item) -> float:
        return self.t0_s + self.per_token_s * item.thinking_tokens

    def __str__(self) -> str:
        per_token_ms = self.per_token_s * 1e3
        return f"{self.t0_s * 1e3:.1f} ms + {per_token_ms:.2f} ms per thinking token"


def fit_idle(thinking_tokens: Sequence[int], ttfo_s: Sequence[float]) -> Idle:
    """Least squares over measurements; the constant never falls below zero."""
    per_token, t0 = np.polyfit(thinking_tokens, ttfo_s, 1)
    return Idle(max(0.0, float(t0)), float(per_token))


async def breaks_of(session: aiohttp.ClientSession, rid: str) -> list[Break] | None:
    """The breaks of a request that has just ended; None where the server does not say."""
    try:
        async with session.get("/pascal/status", timeout=TIMEOUT) as reply:
            if reply.status != 200:
                return None
            status = await reply.json()
        ended = [r for instance in status["instances"] for r in instance.get("recent", ())]
        found = next((r["breaks"] for r in ended if r["rid"] == rid), None)
        return None if found is None else [Break(*each) for each in found]
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
        return None
