"""From one outcome to figures. Times in seconds, shares in [0, 1]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pascal_sglang.sim import tenants
from pascal_sglang.sim.cluster import Setup
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.loads.lengths import Floats
from pascal_sglang.sim.outcome import Outcome
from pascal_sglang.sim.workload import Workload

# Thinking tokens at which bins end; the paper does not say where its own do.
BIN_EDGES = (256, 512, 1000, 2000, 3000, 5000)
# Requests of a bin below which it is not called the worst.
ENOUGH_SAMPLES = 10
# A run is steady if arrivals last as many P99 end-to-end times.
STEADY_TIMES = 10.0


def alone(cost: Cost, workload: Workload) -> Floats:
    """TTFO of every request alone on an idle instance."""
    prompt = np.array(workload.prompt, dtype=float)
    steps = np.array(workload.thinking, dtype=float) + 1
    first = cost.step_s + cost.request_s + cost.kv_token_s * prompt
    decoded = steps * first + cost.kv_token_s * steps * (steps - 1) / 2
    passes = np.ceil(prompt / cost.chunk)
    found: Floats = passes * cost.prefill_s + prompt * cost.prefill_token_s + decoded
    return found


def tail(values: Floats) -> float | None:
    """The tail a sample of this size can support: maximum below 10 values, P90 below 30, P95 below
    100, else P99, as in the paper."""
    if not len(values):
        return None
    if len(values) < 10:
        return float(values.max())
    rank = 90 if len(values) < 30 else 95 if len(values) < 100 else 99
    return float(np.percentile(values, rank))


def bins(thinking: Sequence[int]) -> list[Floats]:
    """Which requests think for how long: a mask per bin of `BIN_EDGES`; an edge is in the lower."""
    place = np.searchsorted(np.array(BIN_EDGES), np.array(thinking))
    return [place == number for number in range(len(BIN_EDGES) + 1)]


def bin_names() -> list[str]:
    low = (0, *BIN_EDGES)
    inner = [f"{a}-{b}" for a, b in itertools.pairwise(low[1:])]
    return [f"<={low[1]}", *inner, f">{low[-1]}"]


def figures(setup: Setup, workload: Workload, outcome: Outcome) -> dict[str, Any]:
    """Everything that is compared.

    slowdown: TTFO over TTFO alone. worst_bin: the thinking-length bin with the highest tail of it.
    big_prompts: the tenth of the requests with the longest prompts. steadiness: P99 end-to-end
    times that arrivals last; below `STEADY_TIMES` a run is mostly ramp. blocking: end of thinking
    to the first answering token. Violations and QoE are of human readers. ttfo_interactive,
    ttfo_batch: by priority. transfer: asking for a move to its KV being there. throughput:
    output tokens per second of what had ended when the last request arrived. efficiency: tokens
    per second that instances were busy.
    """
    ttfo = outcome.first_answer - outcome.arrival
    e2e = outcome.finished - outcome.arrival
    slowdown = ttfo / alone(setup.cost, workload)
    answers = np.array(workload.answer)
    several = answers > 1
    tpot = (outcome.finished - outcome.first_answer)[several] / (answers[several] - 1)
    output = np.array(workload.thinking) + 1 + answers
    window = float(outcome.arrival.max())
    none = [False] * len(workload)
    program = np.array(workload.program or none)
    interactive = np.array(workload.interactive or none)
    qoe = outcome.qoe[~program]
    in_time = outcome.finished <= window
    found: dict[str, Any] = {
        "requests": len(workload),
        "steadiness": window / float(np.percentile(e2e, 99)),
        "tail_ttfo_by_bin": [tail(ttfo[mask]) for mask in bins(workload.thinking)],
        "bin_requests": [int(mask.sum()) for mask in bins(workload.thinking)],
        "slo_violations": float((qoe < setup.slo).mean()) if len(qoe) else 0.0,
        "mean_qoe": float(qoe.mean()) if len(qoe) else 1.0,
        "throughput": float(output[in_time].sum() / window) if window > 0 else 0.0,
        "efficiency": outcome.tokens / outcome.busy_s,
        "moved": int(outcome.moved.sum()),
        "refused_moves": outcome.refused_migrations,
        "paused": int((outcome.pauses > 0).sum()),
        "pauses": int(outcome.pauses.sum()),
        "tiers": dict(outcome.tiers),
        "decisions": dict(outcome.decisions),
        "recomputed_tokens": outcome.recomputed_tokens,
        "copied_tokens": outcome.copied_tokens,
        "most_held": outcome.most_held,
        "end_s": outcome.end_s,
        "events": outcome.events,
        "wall_s": outcome.wall_s,
    }
    for name, values in (
        ("ttfo", ttfo),
        ("slowdown", slowdown),
        ("slowdown_big_prompts", slowdown[_big_prompts(workload.prompt)]),
        ("ttft", outcome.first_token - outcome.arrival),
        ("blocking", outcome.first_answer - outcome.reasoning_end),
        ("e2e", e2e),
        ("e2e_program", e2e[program]),
        ("ttfo_interactive", ttfo[interactive]),
        ("ttfo_batch", ttfo[~interactive] if interactive.any() else ttfo[interactive]),
        ("answer_tpot", tpot),
        ("transfer", np.array(outcome.transfers_s)),
    ):
        found |= _spread(name, values)
    tails = [tail(slowdown[mask]) for mask in bins(workload.thinking)]
    known = [
        (value, name)
        for value, name, count in zip(tails, bin_names(), found["bin_requests"], strict=True)
        if value is not None and count >= ENOUGH_SAMPLES
    ]
    found["worst_bin_slowdown"], found["worst_bin"] = max(known, default=(None, None))
    if workload.tenant:
        found |= tenants.figures(workload, outcome, alone(setup.cost, workload))
    return found


def _big_prompts(prompt: Sequence[int]) -> npt.NDArray[np.bool_]:
    tokens = np.array(prompt)
    found: npt.NDArray[np.bool_] = tokens >= np.percentile(tokens, 90)
    return found


def _spread(name: str, values: Floats) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(f"{stat}_{name}" for stat in ("mean", "median", "p90", "p99", "max"))
    median, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        f"mean_{name}": float(values.mean()),
        f"median_{name}": float(median),
        f"p90_{name}": float(p90),
        f"p99_{name}": float(p99),
        f"max_{name}": float(values.max()),
    }
