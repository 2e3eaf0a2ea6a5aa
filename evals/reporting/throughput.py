"""How much a server did in one run: rates over the whole run, and peaks. Pure; times in seconds.

Keys and meanings are those of `sglang.benchmark.serving`, with the arrival window added: a drained
queue at the end of a run says nothing about the load, so that window is reported by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evals.load.record import Record
from evals.workload import Item


def throughput(records: Sequence[Record], items: Sequence[Item]) -> dict[str, Any]:
    """From the first arrival to the last token; without any token all rates are 0."""
    first, last = min(i.arrival_s for i in items), max(i.arrival_s for i in items)
    done = [r for r in records if r.finished and r.error is None and r.token_s]
    duration = max((r.token_s[-1] for r in records if r.token_s), default=last) - first
    window = last - first
    prompt = sum(item.prompt_tokens for item in items)
    output = sum(len(record.token_s) for record in records)
    in_window = sum(at <= last for record in records for at in record.token_s)

    def per_s(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    return {
        "duration": duration,
        "arrival_window": window,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": per_s(len(done)),
        "input_throughput": per_s(prompt),
        "output_throughput": per_s(output),
        "total_throughput": per_s(prompt + output),
        "window_output_throughput": in_window / window if window else 0.0,
        "concurrency": per_s(sum(r.token_s[-1] - r.arrival_s for r in done)),
        "max_output_tokens_per_s": float(
            max(Counter(int(at - first) for r in records for at in r.token_s).values(), default=0)
        ),
        "max_concurrent_requests": _peak([(r.arrival_s, r.token_s[-1]) for r in done]),
    }


def _peak(spans: Sequence[tuple[float, float]]) -> int:
    """The most spans open at one time; one that ends as another starts does not overlap it."""
    steps = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
