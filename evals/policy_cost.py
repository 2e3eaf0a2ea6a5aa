"""What one policy pass costs: `python -m evals.policy_cost`.

Builds members as the engine adapter would, all of them with memory exhausted so that the plan has
to rank everybody, and times `Planner.plan`. Prints a table; microseconds, best of several rounds.
"""

from __future__ import annotations

import random
import time

from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.order import ORDERS, Moment, Tuning
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Planner, Room
from pascal_sglang.policy.timeline import Phase

SIZES = ((32, 64), (256, 1_000), (1_024, 10_000))
ROUNDS = 7


def members(count: int, place: Place, dice: random.Random) -> list[Member]:
    """`count` members of one place, two thirds of them thinking."""
    made = []
    for seq in range(count):
        pacer = Pacer(0.1, delivered=1, last_shown=dice.random() * 30)
        phase = Phase.REASONING if dice.random() < 2 / 3 else Phase.ANSWERING
        tokens = dice.randrange(4000)
        made.append(
            Member(
                seq=seq,
                pacer=pacer,
                place=place,
                phase=phase,
                phase_tokens=tokens,
                total_tokens=tokens,
                kv_tokens=tokens + 200,
            )
        )
    return made


def cost(policy: str, running: int, others: int) -> tuple[float, float]:
    """Microseconds of a pass that ranks everybody, and of one with nobody waiting or paused."""
    dice = random.Random(0)
    planner = Planner(ORDERS[policy], Tuning())
    active = members(running, Place.RUNNING, dice)
    rest = members(others // 2, Place.WAITING, dice) + members(others // 2, Place.HOST, dice)
    tight, roomy = Room(4 * running, 0, 4096), Room(10**9, 0, 4096)
    moment = Moment(1000, 20.0, 0.02)
    full = min(_timed(planner, active, rest, tight, moment) for _ in range(ROUNDS))
    calm = min(_timed(planner, active, [], roomy, moment) for _ in range(ROUNDS))
    return full, calm


def _timed(
    planner: Planner, active: list[Member], rest: list[Member], room: Room, moment: Moment
) -> float:
    began = time.perf_counter()
    planner.plan(active, rest, room, moment)
    return (time.perf_counter() - began) * 1e6


def main() -> None:
    print(f"{'policy':<12}{'running':>8}{'others':>8}{'full pass (us)':>16}{'calm pass (us)':>16}")
    for policy in ORDERS:
        for running, others in SIZES:
            full, calm = cost(policy, running, others)
            print(f"{policy:<12}{running:>8}{others:>8}{full:>16.0f}{calm:>16.0f}")


if __name__ == "__main__":
    main()
