"""What the data-parallel controller costs: `python -m evals.bench.controllers`.

Two instances of the tiny model, with memory to spare, answer bursts of equal requests: under stock
SGLang, under its own order with our controller, and under `pascal`. Arms take turns. Prints the
throughput of each burst, from the first request to the last token, and how busy the processes of
the server are while nobody asks anything, in per cent of one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil

from evals.arms import Arm, Plan, serve
from evals.bench import pair
from evals.compare import target_of
from evals.load.client import replay
from evals.load.items import Item
from evals.reporting.throughput import throughput
from evals.reporting.verdict import Spread

FLAGS = ("--sleep-on-idle", "--max-running-requests", "256", "--stream-interval")
TURNS = ("--load-balance-method", "round_robin")
ARMS = (
    Arm(name="stock", command="stock", role="stock", flags=TURNS),
    Arm(name="fcfs", command="pascal", role="candidate", flags=("--pascal-policy", "fcfs", *TURNS)),
    Arm(name="pascal", command="pascal", role="candidate"),
)
REPEATS = 3
IDLE_S = 10.0
SETTLE_S = 3.0


def processor_s(pid: int) -> float:
    """CPU time of a process and all below it so far, in seconds."""
    root = psutil.Process(pid)
    times = [p.cpu_times() for p in (root, *root.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def run(arm: Arm, plan: Plan, items: list[Item], model: Path, processor: str) -> tuple[float, ...]:
    """Throughputs of the bursts, and how busy the idle server is (per cent)."""
    with serve(arm, plan, model) as server:
        target, found = target_of(plan, server, processor), []
        replay(items[:8], target, seed=REPEATS)
        for seed in range(REPEATS):
            back = replay(items, target, seed=seed)
            if failed := [r.error for r in back.records if r.error]:
                raise SystemExit(f"{arm.name}: {failed[0]}")
            found.append(throughput(back.records, items)["output_throughput"])
        time.sleep(SETTLE_S)
        before = processor_s(server.pid)
        time.sleep(IDLE_S)
        return (*found, 100 * (processor_s(server.pid) - before) / IDLE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=64, help="at once (%(default)s)")
    parser.add_argument("--tokens", type=int, default=500, help="each answers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of all arms (%(default)s)")
    parser.add_argument("--stream-interval", type=int, default=1)
    options, model, processor = pair.parse(parser)
    thinking = options.tokens // 2
    items = [Item(0.0, 20, thinking, options.tokens - thinking)] * options.requests
    flags = (*FLAGS, str(options.stream_interval))
    plan = pair.plan(ARMS, options.requests, flags)
    print(f"{'arm':<10}{'round':>6}{'tok/s of each burst':>40}{'idle %':>10}")
    seen: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for number in range(options.rounds):
        for arm in ARMS:
            *bursts, idle = run(arm, plan, items, model, processor)
            seen[arm.name] += bursts
            shown = " ".join(f"{value:8.0f}" for value in bursts)
            print(f"{arm.name:<10}{number:>6}{shown:>40}{idle:>10.1f}", flush=True)
    stock = seen.pop("stock")
    for name, values in seen.items():
        ratio = Spread.of([a / b for a, b in zip(values, stock, strict=True)])
        print(f"{name}: {ratio} x stock")


if __name__ == "__main__":
    with pair.one_line_errors():
        main()
