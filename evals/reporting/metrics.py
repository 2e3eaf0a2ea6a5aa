"""From token times to figures. Pure functions; times in seconds, `*_ms` in milliseconds.

TTFT keeps its usual meaning, the first token of any kind; what the user waits for is TTFO, the
first *answering* token.

QoE of an answer whose tokens arrive at d_0, d_1, ... for a reader who takes one token every T:

    ideal_i = d_0 + i T
    shown_0 = d_0,  shown_i = max(d_i, shown_{i-1} + T)
    end     = shown_last + T                     the last token is read as well
    S_delay = sum_i (shown_i - ideal_i)          area between the two curves, token seconds
    S_whole = sum_i (end - ideal_i)              area under the ideal curve up to the end
    QoE     = 1 - S_delay / S_whole              in [0, 1]

Tokens ahead of the reader wait in a buffer, so a pause costs nothing while the buffer lasts. A
request violates its objective when its QoE is below 0.95 or when it failed or never answered.

ITL is the time between two events of a stream, shared evenly by the tokens of the later one: that
is how `sglang.benchmark.serving` counts, which takes no interval inside the first event either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.load.record import Idle, Record
from evals.reporting.throughput import throughput
from evals.workload import Item

QOE_OBJECTIVE = 0.95


@dataclass(frozen=True, slots=True)
class Request:
    """Figures of one request; None where it never got that far.

    slowdown: TTFO over the TTFO of the same item alone.
    """

    thinking_tokens: int
    output_tokens: int
    ok: bool
    answered: bool
    ttft_s: float | None
    tpot_s: float | None
    reasoning_s: float | None
    ttfo_s: float | None
    answer_tpot_s: float | None
    e2e_s: float | None
    qoe: float | None
    slowdown: float | None

    @property
    def violates(self) -> bool:
        return not self.ok or self.qoe is None or self.qoe < QOE_OBJECTIVE


def qoe(answer_s: Sequence[float], target_tpot_s: float) -> float | None:
    """QoE of answering tokens delivered at `answer_s`; None without any. Definition above."""
    if not answer_s:
        return None
    count = np.arange(len(answer_s))
    # shown_i - i T is the running maximum of d_i - i T.
    lateness = np.maximum.accumulate(np.asarray(answer_s) - count * target_tpot_s) - answer_s[0]
    ideal = answer_s[0] + count * target_tpot_s
    end = ideal[-1] + lateness[-1] + target_tpot_s
    return float(np.clip(1 - lateness.sum() / (end - ideal).sum(), 0.0, 1.0))


def intervals(token_s: Sequence[float]) -> list[float]:
    """Inter-token latencies of one stream, as defined above."""
    times, counts = np.unique(np.asarray(token_s), return_counts=True)
    each: list[float] = np.repeat(np.diff(times) / counts[1:], counts[1:]).tolist()
    return each


def _pace(token_s: Sequence[float]) -> float | None:
    """Mean time per token after the first."""
    return (token_s[-1] - token_s[0]) / (len(token_s) - 1) if len(token_s) > 1 else None


def measure(record: Record, item: Item, idle: Idle | None, target_tpot_s: float) -> Request:
    """Figures of one request; `item` says what was asked for. No `idle`, no slowdown."""
    answer, tokens = record.answer_s, record.token_s
    answered = bool(answer)
    ttfo = answer[0] - record.arrival_s if answered else None
    return Request(
        thinking_tokens=item.thinking_tokens,
        output_tokens=len(tokens),
        ok=record.finished and record.error is None,
        answered=answered,
        ttft_s=tokens[0] - record.arrival_s if tokens else None,
        tpot_s=_pace(tokens),
        reasoning_s=(
            tokens[record.reasoning_tokens - 1] - tokens[0]
            if answered and record.reasoning_tokens
            else None
        ),
        ttfo_s=ttfo,
        answer_tpot_s=_pace(answer),
        e2e_s=tokens[-1] - record.arrival_s if record.finished and tokens else None,
        qoe=qoe(answer, target_tpot_s),
        slowdown=ttfo / idle.ttfo_s(item) if idle is not None and ttfo is not None else None,
    )


def tail(values: Sequence[float]) -> float | None:
    """The tail a sample of this size can support: maximum below 10 values, P90 below 30, P95 below
    100, else P99."""
    if not values:
        return None
    if len(values) < 10:
        return max(values)
    return float(np.percentile(values, 90 if len(values) < 30 else 95 if len(values) < 100 else 99))


def bin_edges(thinking_tokens: Sequence[int], bins: int) -> list[float]:
    """Inner edges that cut a workload into `bins` equal parts; every arm is cut by the same."""
    inner = np.quantile(thinking_tokens, np.arange(1, bins) / bins)
    return [float(edge) for edge in np.unique(inner)]


def ttfo_by_bin(requests: Sequence[Request], edges: Sequence[float]) -> list[list[float]]:
    """TTFO in seconds per thinking-length bin; a length on an edge is in the lower bin."""
    bins: list[list[float]] = [[] for _ in range(len(edges) + 1)]
    for request in requests:
        if request.ttfo_s is not None:
            bins[int(np.searchsorted(edges, request.thinking_tokens))].append(request.ttfo_s)
    return bins


GOODPUT_KEYS: dict[str, Callable[[Request], float | None]] = {
    "ttft": lambda r: r.ttft_s,
    "tpot": lambda r: r.tpot_s,
    "ttfo": lambda r: r.ttfo_s,
    "answer_tpot": lambda r: r.answer_tpot_s,
    "e2el": lambda r: r.e2e_s,
}


def meets(request: Request, objectives_ms: Mapping[str, float]) -> bool:
    """Whether a request finished inside every bound; a single token has no pace to miss."""
    return request.ok and all(
        (seen is None and key.endswith("tpot")) or (seen is not None and seen * 1e3 <= bound)
        for key, bound in objectives_ms.items()
        for seen in (GOODPUT_KEYS[key](request),)
    )


def _goodput(
    requests: Sequence[Request], objectives_ms: Mapping[str, float], duration_s: float
) -> dict[str, object]:
    good = sum(meets(r, objectives_ms) for r in requests)
    return {
        "goodput_slos_ms": dict(objectives_ms),
        "request_goodput": good / duration_s if duration_s > 0 else 0.0,
        "slo_attainment": good / len(requests),
        "slo_attainment_by_metric": {
            key: sum(meets(r, {key: bound}) for r in requests) / len(requests)
            for key, bound in objectives_ms.items()
        },
    }


def summarize(
    records: Sequence[Record],
    items: Sequence[Item],
    *,
    idle: Idle | None,
    target_tpot_s: float,
    edges: Sequence[float],
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """All figures of one run under the key names of `sglang.benchmark.serving`, and ours.

    Latencies are over the requests that got that far; `failed` and `no_answer` count the others.
    """
    requests = [
        measure(record, item, idle, target_tpot_s)
        for record, item in zip(records, items, strict=True)
    ]
    completed = sum(r.ok for r in requests)
    answers = sum(len(record.answer_s) for record in records)
    bins = ttfo_by_bin(requests, edges)
    done = throughput(records, items)
    summary: dict[str, object] = {
        "completed": completed,
        "failed": len(requests) - completed,
        "no_answer": sum(not r.answered for r in requests),
        "errors": sorted({r.error for r in records if r.error}),
        **done,
        "reasoning_tokens": done["total_output_tokens"] - answers,
        "answer_tokens": answers,
        "slo_violations": sum(r.violates for r in requests) / len(requests),
        "bin_requests": [len(values) for values in bins],
        "tail_ttfo_by_bin": [tail(values) for values in bins],
    }
    if goodput_ms:
        summary |= _goodput(requests, goodput_ms, done["duration"])
    for name, values in (
        ("e2e_latency_ms", [r.e2e_s for r in requests]),
        ("ttft_ms", [r.ttft_s for r in requests]),
        ("tpot_ms", [r.tpot_s for r in requests]),
        ("itl_ms", [gap for r in records for gap in intervals(r.token_s)]),
        ("reasoning_time_ms", [r.reasoning_s for r in requests]),
        ("ttfo_ms", [r.ttfo_s for r in requests]),
        ("blocking_ms", [record.blocking_s for record in records]),
        ("answer_tpot_ms", [r.answer_tpot_s for r in requests]),
        ("answer_itl_ms", [b - a for r in records for a, b in itertools.pairwise(r.answer_s)]),
    ):
        summary.update(_spread(name, [v * 1e3 for v in values if v is not None]))
    summary.update(_spread("slowdown", [r.slowdown for r in requests if r.slowdown is not None]))
    summary.update(_spread("qoe", [r.qoe for r in requests if r.qoe is not None]))
    return summary


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys((f"{stat}_{name}" for stat in ("mean", "std", *_RANKS, "max")), None)
    ranks = {f"{rank}_{name}": float(np.percentile(values, p)) for rank, p in _RANKS.items()}
    return {
        f"mean_{name}": float(np.mean(values)),
        f"std_{name}": float(np.std(values)),
        **ranks,
        f"max_{name}": float(max(values)),
    }


_RANKS = {"median": 50, "p90": 90, "p95": 95, "p99": 99}
