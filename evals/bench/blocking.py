"""How long a move keeps a reader waiting: `python -m evals.bench.blocking`.

Starts two instances of the tiny model for every way to move (live or stop-and-copy, over every KV
transport), lets requests with long prompts move by the paper's counts, and prints the time from the
last token on one instance to the first on the next, as the server reports it. `step` is the mean
time between two tokens in the same run: what any reader waits for anyway.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from evals.arms import Arm, Plan, serve
from evals.bench import pair
from evals.compare import target_of
from evals.load import remote
from evals.load.client import replay
from evals.load.items import Item
from evals.reporting.metrics import intervals

FLAGS = ("--stream-interval", "1", "--max-running-requests", "64")
PASCAL_FLAGS = ("--pascal-policy", "paper", "--pascal-migration", "always")


def blocked_s(base_url: str) -> tuple[list[float], int]:
    """Blocking times of all moves so far, and bytes of KV sent."""
    migrations = [instance["migrations"] for instance in remote.instances(base_url)]
    return [s for move in migrations for s in move["blocked_s"]], sum(
        m["bytes"] for m in migrations
    )


def run(arm: Arm, plan: Plan, items: list[Item], model: Path, processor: str) -> str:
    """One row of the table."""
    with serve(arm, plan, model) as server:
        back = replay(items, target_of(plan, server, processor), seed=0)
        blocked, sent = blocked_s(server.base_url)
    failed = [r.error for r in back.records if r.error]
    if failed or not blocked:
        raise SystemExit(f"{arm.name}: {failed[:1] or 'nobody moved'}")
    step = statistics.mean(gap for r in back.records for gap in intervals(r.token_s))
    ranks = np.percentile(blocked, (50, 90, 99, 100)) * 1e3
    figures = "".join(f"{value:>10.1f}" for value in (*ranks, step * 1e3))
    return f"{arm.name:<24}{len(blocked):>7}{sent / 2**20 / len(blocked):>10.1f}{figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.2, help="requests per second (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    options, model, processor = pair.parse(parser)
    items = [
        Item(number / options.rate, options.prompt_tokens, 10 + number % 30, 120)
        for number in range(options.requests)
    ]
    columns = ("p50 ms", "p90 ms", "p99 ms", "max ms", "step ms")
    header = "".join(f"{column:>10}" for column in columns)
    print(f"{'way':<24}{'moves':>7}{'MiB each':>10}{header}")
    for transport in ("shm", "mooncake"):
        for live in ("--pascal-live-migration", "--no-pascal-live-migration"):
            name = f"{transport} {'stop-and-copy' if live.startswith('--no') else 'live'}"
            flags = (*PASCAL_FLAGS, "--pascal-kv-transport", transport, live)
            arm = Arm(name=name, command="pascal", role="candidate", flags=flags)
            plan = pair.plan((arm,), options.requests, FLAGS)
            print(run(arm, plan, items, model, processor), flush=True)


if __name__ == "__main__":
    with pair.one_line_errors():
        main()
