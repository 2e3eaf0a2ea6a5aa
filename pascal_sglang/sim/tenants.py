"""How alike tenants were treated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pascal_sglang.sim.loads.lengths import Floats
from pascal_sglang.sim.outcome import Outcome
from pascal_sglang.sim.workload import Workload


def fair_shares(asked: Sequence[float], given: float) -> list[float]:
    """Max-min fairness: what each should have of what was `given` to all, none more than it asked
    for."""
    shares = [0.0] * len(asked)
    order = sorted(range(len(asked)), key=asked.__getitem__)
    for place, index in enumerate(order):
        shares[index] = min(asked[index], given / (len(order) - place))
        given -= shares[index]
    return shares


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all are equal, 1 / n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def made_by(now: float, begin: Floats, end: Floats, tokens: Floats) -> Floats:
    """Tokens that requests had made by `now`, if they made them evenly between two times."""
    passed = (now - begin) / np.maximum(1e-9, end - begin)
    made: Floats = tokens * np.clip(passed, 0.0, 1.0)
    return made


def figures(workload: Workload, outcome: Outcome, alone_s: Floats) -> dict[str, Any]:
    """jain: Jain's index of what each tenant got until the last request arrived, as a share of what
    it should have got by max-min fairness. What it asked for is what its requests would have made
    by then on an instance of their own. ttfo_by_tenant, p99_ttfo_by_tenant: seconds.

    alone_s: TTFO of every request alone on an idle instance.
    """
    whose = np.array(workload.tenant)
    tenants = sorted(set(workload.tenant))
    ttfo = outcome.first_answer - outcome.arrival
    thinking = np.array(workload.thinking, dtype=float) + 1
    tokens = thinking + np.array(workload.answer)
    now, arrival = float(outcome.arrival.max()), outcome.arrival
    ideal = made_by(now, arrival, arrival + alone_s * tokens / thinking, tokens)
    made = made_by(now, outcome.first_token, outcome.finished, tokens)
    masks = [whose == tenant for tenant in tenants]
    got = [float(made[mask].sum()) for mask in masks]
    shares = fair_shares([float(ideal[mask].sum()) for mask in masks], sum(got))
    return {
        "jain": jain([its / max(1e-9, share) for its, share in zip(got, shares, strict=True)]),
        "requests_by_tenant": [int(mask.sum()) for mask in masks],
        "ttfo_by_tenant": [float(ttfo[mask].mean()) for mask in masks],
        "p99_ttfo_by_tenant": [float(np.percentile(ttfo[mask], 99)) for mask in masks],
    }
