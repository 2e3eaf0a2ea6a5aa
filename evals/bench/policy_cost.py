"""What one policy pass costs: `python -m evals.bench.policy_cost`.

Builds requests as the engine does, with KV memory exhausted, and times `Planner.plan`:

steady        no request can displace another, as in most passes
arrivals      in every pass a short thinker arrives and the plan is carried out
full_rerank   half of the running requests rank below every waiting one: all that one pass changes

Times also what comes in every pass whatever the policy decides, the observation of all who run, on
requests of SGLang:

observe     two thirds think, the others answer ahead of their readers
readers     all answer, in passes longer than a reader takes for a token: each reader waits

Prints microseconds: the mean of many passes in a row for the first, mean and P99 for the second, a
single pass for the third, the median of many passes for the others; best of several rounds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time

from pascal_sglang.policy.pacer import Pacer
from pascal_sglang.policy.plan import GROWTH, Capacity, Planner
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import POLICIES
from pascal_sglang.policy.request import RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

SIZES = ((32, 64), (256, 1_000), (1_024, 10_000))
ROUNDS = 5
PASSES = 200
# Passes until all that can start at once has started.
WARM_UP = 50
NOW = 29.0
ARRIVALS = itertools.count()


def requests(
    count: int, status: RequestStatus, dice: random.Random, steady: bool
) -> list[RequestState]:
    """`count` requests of one status, two thirds of them thinking. `steady`: those who run outrank
    those who do not, as they mostly do between two changes."""
    made = []
    for _ in range(count):
        ahead = not steady or status is not RequestStatus.RUNNING
        pacer = Pacer(0.1, delivered=1, last_shown=dice.random() * 30 + (30 if ahead else 0))
        phase = Phase.REASONING if dice.random() < 2 / 3 else Phase.ANSWERING
        low, high = (0, 4000) if not steady else (0, 499) if not ahead else (500, 4000)
        tokens = dice.randrange(low, high)
        made.append(
            RequestState(
                seq=next(ARRIVALS),
                pacer=pacer,
                status=status,
                phase=phase,
                phase_tokens=tokens,
                total_tokens=tokens,
                kv_tokens=tokens + 200,
            )
        )
    return made


def scene(
    policy: str, running: int, others: int, steady: bool
) -> tuple[Planner, list[RequestState]]:
    dice = random.Random(0)
    planner = Planner(POLICIES[policy], Tuning())
    active = requests(running, RequestStatus.RUNNING, dice, steady)
    waiting = requests(others // 2, RequestStatus.WAITING, dice, steady)
    planner.queue.recount(waiting + requests(others // 2, RequestStatus.HOST, dice, steady))
    return planner, active


def one_pass(planner: Planner, active: list[RequestState], turn: int) -> tuple[float, PassInfo]:
    capacity, pass_info = Capacity(GROWTH * len(active), 0, 4096), PassInfo(turn, NOW, 0.02)
    began = time.perf_counter()
    plan = planner.plan(active, capacity, pass_info)
    took = (time.perf_counter() - began) * 1e6
    for victim in plan.pause:
        active.remove(victim)
        planner.queue.stopped(victim, RequestStatus.HOST, pass_info)
    for request in plan.start:
        active.append(request)
        planner.queue.started(request, pass_info)
    return took, pass_info


def steady_us(policy: str, running: int, others: int) -> float:
    planner, active = scene(policy, running, others, steady=True)
    return statistics.mean(one_pass(planner, active, turn)[0] for turn in range(PASSES))


def arrivals_us(policy: str, running: int, others: int) -> list[float]:
    planner, active = scene(policy, running, others, steady=False)
    for turn in range(WARM_UP):
        one_pass(planner, active, turn)
    took = []
    for turn in range(WARM_UP, WARM_UP + PASSES):
        fresh = RequestState(seq=next(ARRIVALS), pacer=Pacer(0.1), kv_tokens=100)
        planner.queue.stopped(fresh, RequestStatus.WAITING, PassInfo(turn, NOW, 0.02))
        took.append(one_pass(planner, active, turn)[0])
    return took


def full_rerank_us(policy: str, running: int, others: int) -> float:
    planner, active = scene(policy, running, others, steady=False)
    return one_pass(planner, active, 0)[0]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    # Importing SGLang takes seconds, which `--help` need not take.
    from evals.bench.observation_cost import observe_us

    observed = {
        running: (
            min(observe_us(running, pass_s=0.02, thinking=2 / 3) for _ in range(ROUNDS)),
            min(observe_us(running, pass_s=0.15, thinking=0.0) for _ in range(ROUNDS)),
        )
        for running, _ in SIZES
    }
    columns = ("steady", "arrivals", "p99", "full_rerank", "observe", "readers")
    print(f"{'policy':<12}{'running':>8}{'others':>8}" + "".join(f"{c:>12}" for c in columns))
    for policy in (name for name, record in POLICIES.items() if record.schedules):
        for size in SIZES:
            steady = min(steady_us(policy, *size) for _ in range(ROUNDS))
            flow = min((arrivals_us(policy, *size) for _ in range(ROUNDS)), key=statistics.mean)
            p99 = statistics.quantiles(flow, n=100)[98]
            full_rerank = min(full_rerank_us(policy, *size) for _ in range(ROUNDS))
            figures = (steady, statistics.mean(flow), p99, full_rerank, *observed[size[0]])
            row = f"{policy:<12}{size[0]:>8}{size[1]:>8}"
            print(row + "".join(f"{figure:>12.0f}" for figure in figures))


if __name__ == "__main__":
    main()
