"""How long a move keeps a reader waiting, by how much KV travels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.arms import Arm, Plan
from evals.gpu.servers import two_instances
from evals.load import remote
from evals.load.client import Target, replay
from evals.load.items import Item
from evals.load.server import ArmError
from evals.reporting.metrics import intervals

# A request thinks for a few tokens, moves at the end of that, and answers.
THINKING, ANSWER = 10, 100


# Every request moves at the end of its thinking, and hardly any at another time.
MOVING = {"policy": "pascal", "force_migration": 1e-9}


def moving(plan: Plan) -> Arm:
    """The server that moves every request once."""
    return two_instances("moving", plan, MOVING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Moves of requests with prompts of one length.

    moves: those that arrived. others: those that ended otherwise, by outcome. mib: KV of a move.
    blocked_ms: from the last token on one instance to the first on the next, median and longest.
    step_ms: between two tokens in the same run, on average.
    """

    prompt_tokens: int
    moves: int
    others: dict[str, int]
    mib: float
    blocked_ms: tuple[float, float]
    step_ms: float

    @property
    def steps(self) -> float:
        """Steps that a reader misses by a move."""
        return self.blocked_ms[0] / self.step_ms if self.step_ms else 0.0


def items_of(plan: Plan, prompt_tokens: int, requests: int) -> list[Item]:
    """Requests at the plan's rate, whose lengths of thinking differ, so that they do not all move
    at once."""
    per_s = plan.rates[0].per_s
    return [
        Item(number / per_s, prompt_tokens, THINKING + number % 30, ANSWER)
        for number in range(requests)
    ]


def measure(target: Target, items: Sequence[Item]) -> Row:
    """Send requests with prompts of one length. Raises: ArmError if one fails."""
    prompt_tokens = items[0].prompt_tokens
    before = remote.instances(target.base_url)
    back = replay(items, target, seed=prompt_tokens)
    after = remote.instances(target.base_url)
    if failed := [record.error for record in back.records if record.error]:
        raise ArmError(f"{len(failed)} requests failed: {failed[0]}")
    gaps = [gap for record in back.records for gap in intervals(record.token_s)]
    return row_of(prompt_tokens, before, after, gaps)


def row_of(
    prompt_tokens: int,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    gaps_s: Sequence[float],
) -> Row:
    """From what the instances said before and after a run."""
    blocked_s: list[float] = []
    outcomes: dict[str, int] = {}
    sent = 0
    for was, now in zip(before, after, strict=True):
        was, now = was["migrations"], now["migrations"]
        blocked_s += now["blocked_s"][len(was["blocked_s"]) :]
        sent += now["bytes"] - was["bytes"]
        for outcome, count in now["outgoing"].items():
            more = count - was["outgoing"].get(outcome, 0)
            outcomes[outcome] = outcomes.get(outcome, 0) + more
    moved = outcomes.pop("moved", 0)
    median = statistics.median(blocked_s) if blocked_s else 0.0
    return Row(
        prompt_tokens=prompt_tokens,
        moves=moved,
        others={outcome: count for outcome, count in outcomes.items() if count},
        mib=sent / 2**20 / moved if moved else 0.0,
        blocked_ms=(1e3 * median, 1e3 * max(blocked_s, default=0.0)),
        step_ms=1e3 * statistics.mean(gaps_s) if gaps_s else 0.0,
    )
