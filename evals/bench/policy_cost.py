"""What one policy pass costs: `python -m evals.bench.policy_cost`.

Builds members as the engine adapter would, with KV memory exhausted, and times `Planner.plan`:

settled     nobody can displace anybody, as in most passes
arrivals    in every pass a short thinker arrives and the plan is carried out
uproar      half of those who run rank below everybody who waits, all at once

Prints microseconds: the mean of many passes in a row for the first, mean and P99 for the second, a
single pass for the third; best of several rounds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time

from pascal_sglang.policy.making import GROWTH
from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import Planner, Room
from pascal_sglang.policy.ranking import ORDERS, Moment, Tuning
from pascal_sglang.policy.request import Member, Place
from pascal_sglang.policy.timeline import Phase

SIZES = ((32, 64), (256, 1_000), (1_024, 10_000))
ROUNDS = 5
PASSES = 200
NOW = 29.0
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


def scene(policy: str, running: int, others: int, settled: bool) -> tuple[Planner, list[Member]]:
    dice = random.Random(0)
    planner = Planner(ORDERS[policy], Tuning())
    active = members(running, Place.RUNNING, dice, settled)
    waiting = members(others // 2, Place.WAITING, dice, settled)
    planner.recount(waiting + members(others // 2, Place.HOST, dice, settled))
    return planner, active


def one_pass(planner: Planner, active: list[Member], turn: int) -> tuple[float, Moment]:
    room, moment = Room(GROWTH * len(active), 0, 4096), Moment(turn, NOW, 0.02)
    began = time.perf_counter()
    plan = planner.plan(active, room, moment)
    took = (time.perf_counter() - began) * 1e6
    for victim in plan.pause:
        active.remove(victim)
        planner.stopped(victim, Place.HOST, moment)
    for member in plan.start:
        active.append(member)
        planner.started(member, moment)
    return took, moment


def settled_us(policy: str, running: int, others: int) -> float:
    planner, active = scene(policy, running, others, settled=True)
    return statistics.mean(one_pass(planner, active, turn)[0] for turn in range(PASSES))


def arrivals_us(policy: str, running: int, others: int) -> list[float]:
    planner, active = scene(policy, running, others, settled=False)
    one_pass(planner, active, 0)
    took = []
    for turn in range(1, PASSES):
        fresh = Member(seq=next(ARRIVALS), pacer=Pacer(0.1), kv_tokens=100)
        planner.stopped(fresh, Place.WAITING, Moment(turn, NOW, 0.02))
        took.append(one_pass(planner, active, turn)[0])
    return took


def uproar_us(policy: str, running: int, others: int) -> float:
    planner, active = scene(policy, running, others, settled=False)
    return one_pass(planner, active, 0)[0]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    columns = ("settled", "arrivals", "p99", "uproar")
    print(f"{'policy':<12}{'running':>8}{'others':>8}" + "".join(f"{c:>10}" for c in columns))
    for policy in ORDERS:
        for size in SIZES:
            settled = min(settled_us(policy, *size) for _ in range(ROUNDS))
            flow = min((arrivals_us(policy, *size) for _ in range(ROUNDS)), key=statistics.mean)
            p99 = statistics.quantiles(flow, n=100)[98]
            uproar = min(uproar_us(policy, *size) for _ in range(ROUNDS))
            figures = (settled, statistics.mean(flow), p99, uproar)
            row = f"{policy:<12}{size[0]:>8}{size[1]:>8}"
            print(row + "".join(f"{figure:>10.0f}" for figure in figures))


if __name__ == "__main__":
    main()
