"""What one policy pass costs: `python -m evals.policy_cost`.

Builds members as the engine adapter would, with memory exhausted, and times `Planner.plan`.
Prints a table in microseconds, best of several rounds.
"""

from __future__ import annotations

import itertools
import random
import time

from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.order import ORDERS, Moment, Tuning
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Planner, Room
from pascal_sglang.policy.timeline import Phase

SIZES = ((32, 64), (256, 1_000), (1_024, 10_000))
ROUNDS = 7
ARRIVALS = itertools.count()


def members(count: int, place: Place, dice: random.Random, settled: bool) -> list[Member]:
    """`count` members of one place, two thirds of them thinking. `settled`: those who run outrank
    those who do not, as they mostly do between two changes."""
    made = []
    for _ in range(count):
        ahead = not settled or place is not Place.RUNNING
        pacer = Pacer(0.1, delivered=1, last_shown=dice.random() * 30 + (30 if ahead else 0))
        phase = Phase.REASONING if dice.random() < 2 / 3 else Phase.ANSWERING
        low, high = (0, 4000) if not settled else (0, 499) if not ahead else (500, 4000)
        tokens = dice.randrange(low, high)
        made.append(
            Member(
                seq=next(ARRIVALS),
                pacer=pacer,
                place=place,
                phase=phase,
                phase_tokens=tokens,
                total_tokens=tokens,
                kv_tokens=tokens + 200,
            )
        )
    return made


def cost(policy: str, running: int, others: int, settled: bool) -> float:
    """Mean microseconds of a pass over many in a row, with memory exhausted."""
    dice = random.Random(0)
    planner = Planner(ORDERS[policy], Tuning())
    active = members(running, Place.RUNNING, dice, settled)
    for place in (Place.WAITING, Place.HOST):
        for member in members(others // 2, place, dice, settled):
            planner.line.add(member)
    room = Room(4 * running, 0, 4096)

    def passes(count: int) -> float:
        began = time.perf_counter()
        for turn in range(count):
            planner.plan(active, room, Moment(turn, 29.0, 0.02))
        return (time.perf_counter() - began) / count * 1e6

    return min(passes(64) for _ in range(ROUNDS))


def main() -> None:
    print(f"{'policy':<12}{'running':>8}{'others':>8}{'settled':>12}{'displacing':>12}")
    for policy in ORDERS:
        for running, others in SIZES:
            calm, busy = (cost(policy, running, others, settled) for settled in (True, False))
            print(f"{policy:<12}{running:>8}{others:>8}{calm:>12.0f}{busy:>12.0f}")


if __name__ == "__main__":
    main()
