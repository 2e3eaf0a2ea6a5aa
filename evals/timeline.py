"""What one request went through, as far as its client can tell. Pure; times in seconds.

A client sees only when tokens arrive. A *stall* is a gap between two of them of more than
`STALL_FACTOR` times the median gap of the same request: the server may have paused or moved it, or
merely been busy. The server's own counters say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from evals.metrics import Record
    from evals.workload import Item

STATES = ("queued", "thinking", "stalled", "answering")
STALL_FACTOR = 10.0
SHOWN = 6


class Segment(NamedTuple):
    """`state` from `start_s` to `end_s` after the request was due."""

    state: str
    start_s: float
    end_s: float


def segments(record: Record, end_s: float) -> list[Segment]:
    """The request's states in order, without gaps between them.

    end_s: until when the run was watched; a request without a token is queued until then.
    """
    if not record.token_s:
        return [Segment("queued", 0.0, max(0.0, end_s - record.arrival_s))]
    at = np.asarray(record.token_s) - record.arrival_s
    gaps = np.diff(at)
    # Tokens that came in one event have no gap between them.
    usual = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 0.0
    found = [Segment("queued", 0.0, float(at[0]))]
    for index, gap in enumerate(gaps.tolist(), start=1):
        # The marker ends the thinking; the time to the next token is already the answer's.
        state = "thinking" if index < record.reasoning_tokens else "answering"
        if gap > STALL_FACTOR * usual:
            state = "stalled"
        last, end = found[-1], float(at[index])
        if last.state == state:
            found[-1] = last._replace(end_s=end)
        elif gap > 0:
            found.append(Segment(state, last.end_s, end))
    return found


def sample(items: Sequence[Item], count: int = SHOWN) -> list[int]:
    """Indices from the shortest to the longest thinking, evenly spread; every arm that replays the
    same items gets the same ones."""
    order = sorted(range(len(items)), key=lambda i: (items[i].thinking_tokens, i))
    picks = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [order[round(pick)] for pick in picks]


def details(records: Sequence[Record], items: Sequence[Item]) -> dict[str, Any]:
    """What a page needs beyond the summary: TTFO of every request, and a few timelines."""
    end_s = max((r.token_s[-1] for r in records if r.token_s), default=0.0)
    return {
        "ttfos": [r.answer_s[0] - r.arrival_s if r.answer_s else None for r in records],
        "timelines": [
            {
                "request": index,
                "thinking_tokens": items[index].thinking_tokens,
                "answer_tokens": items[index].answer_tokens,
                "error": records[index].error,
                "segments": [list(s) for s in segments(records[index], end_s)],
            }
            for index in sample(items)
        ],
    }
