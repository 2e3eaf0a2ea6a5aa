"""What one request went through, as far as its client can tell. Pure; times in seconds.

A client sees only when tokens arrive. A *stall* is a gap between two of them of more than
`STALL_FACTOR` times the median gap of the same request. Servers of ours tell when they paused or
moved it; what they do not explain, and any stall of another server, stays a stall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from evals.load.record import Record
    from evals.workload import Item

STALL_FACTOR = 10.0
SHOWN = 6


class Segment(NamedTuple):
    """`state` from `start_s` to `end_s` after the request was due: `queued`, `thinking`,
    `answering`, `stalled`, or the kind of a break."""

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
    breaks = _breaks(record, float(at[0]), float(at[-1]))
    for index, gap in enumerate(gaps.tolist(), start=1):
        # The marker ends the thinking; the time to the next token is already the answer's.
        state = "thinking" if index < record.reasoning_tokens else "answering"
        last, end = found[-1], float(at[index])
        told = any(b.start_s < end and b.end_s > last.end_s for b in breaks)
        if gap > STALL_FACTOR * usual and not told:
            state = "stalled"
        if last.state == state:
            found[-1] = last._replace(end_s=end)
        elif gap > 0:
            found.append(Segment(state, last.end_s, end))
    for each in breaks:
        found = _put(each, found)
    return found


def _breaks(record: Record, first_s: float, last_s: float) -> list[Segment]:
    """What the server told, on the client's clock, between the first token and the last."""
    sent_s = (record.sent_s or record.arrival_s) - record.arrival_s
    cut = (
        Segment(b.kind, max(first_s, sent_s + b.start_s), min(last_s, sent_s + b.end_s))
        for b in record.breaks or ()
    )
    return [each for each in cut if each.start_s < each.end_s]


def _put(new: Segment, over: Sequence[Segment]) -> list[Segment]:
    """`new` in place of whatever was there in its time."""
    before = [s._replace(end_s=min(s.end_s, new.start_s)) for s in over if s.start_s < new.start_s]
    after = [s._replace(start_s=max(s.start_s, new.end_s)) for s in over if s.end_s > new.end_s]
    return [*before, new, *after]


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
