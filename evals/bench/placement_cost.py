"""What the controller's decisions cost: `python -m evals.bench.placement_cost`.

The controller's own parts without its sockets: monitor, prefixes, residents, placement, moves. They
hold 100,000 live requests, and every message is packed and read as on the wire. In each turn one
instance reports, a request arrives and is placed, one ends its thinking (and moves or not), and one
ends. Prints microseconds per decision, mean and P99, and turns per second.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from array import array
from collections import deque

from pascal_sglang.cluster.codec import pack, unpack
from pascal_sglang.cluster.load_tracker import LoadTracker
from pascal_sglang.cluster.messages import (
    LoadReport,
    MigrateCommand,
    MigrationEnded,
    ReasoningEnded,
    RequestFinished,
)
from pascal_sglang.cluster.migration_coordinator import MigrationCoordinator
from pascal_sglang.cluster.prefix_index import PrefixIndex, block_names
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.policy.placement import Placement

PROMPT_TOKENS = 256
KV_TOKENS = 400_000
POLICIES = {"pascal": True, "paper": False}


class Cluster:
    """A controller's memory, and instances that only exist as figures."""

    def __init__(self, instances: int, lazy: bool) -> None:
        self.instances = instances
        self.dice = random.Random(0)
        self.load_tracker = LoadTracker(instances)
        self.prefixes = PrefixIndex()
        self.request_locations = RequestLocations()
        self.placement = Placement(quantum=500, lazy=lazy, predict=lazy)
        self.orders: list[tuple[int, MigrateCommand]] = []
        self.coordinator = MigrationCoordinator(self.load_tracker, self.placement, self._order)
        self.live: deque[tuple[str, int, array[int]]] = deque()
        self.received = [0] * instances
        for index in range(instances):
            self.report(index)

    def _order(self, to: int, order: MigrateCommand) -> bool:
        pack(order)
        self.orders.append((to, order))
        return True

    def prompt(self) -> array[int]:
        # A thousand system prompts, each with many questions.
        shared, own = self.dice.randrange(1000), self.dice.randrange(1 << 30)
        half = PROMPT_TOKENS // 2
        return array("q", [shared] * half + [own] * half)

    def report(self, index: int) -> None:
        free = self.dice.randrange(KV_TOKENS // 4)
        status = LoadReport(
            dp_rank=index,
            received=self.received[index],
            on_pace=self.dice.random() < 0.9,
            footprint=KV_TOKENS - free,
            reasoning=self.dice.randrange(60),
            fresh=self.dice.randrange(20),
            free=free,
            fits=self.dice.randrange(200),
            waiting=self.dice.randrange(1000),
            capacity=KV_TOKENS,
            load=self.dice.randrange(200),
            batch=self.dice.randrange(200),
            pass_us=self.dice.randrange(20_000, 60_000),
            prefill_ns=80_000,
        )
        _, read = unpack(pack(status, index), self.instances)
        self.load_tracker.hear(read, 0.0)

    def arrive(self, number: int) -> float:
        """A request arrives; microseconds that placing it took."""
        prompt = self.prompt()
        began = time.perf_counter()
        blocks = list(block_names(prompt))
        hits = self.prefixes.hits(blocks)
        candidates = self.placement.in_sight(self.load_tracker.instances, hits)
        index = self.placement.place(candidates, len(prompt), hits)
        self.load_tracker.sent(index, len(prompt))
        self.prefixes.sent(index, blocks)
        self.request_locations.lives(str(number), index)
        took = (time.perf_counter() - began) * 1e6
        self.received[index] += 1
        self.live.append((str(number), index, prompt))
        return took

    def cross(self) -> float:
        """A request ends its thinking; microseconds that deciding took, its message included."""
        rid, index, _ = self.live[self.dice.randrange(min(1000, len(self.live)))]
        data = pack(ReasoningEnded(index, rid, 3000, 2000, 600, 10), index)
        began = time.perf_counter()
        _, boundary = unpack(data, self.instances)
        self.coordinator.boundary(boundary, self.load_tracker.instances, 0.0)
        took = (time.perf_counter() - began) * 1e6
        for to, order in self.orders:
            self.coordinator.over(MigrationEnded(to, order.migration, True, ""))
        self.orders.clear()
        return took

    def end(self) -> None:
        rid, index, prompt = self.live.popleft()
        data = pack(RequestFinished(index, rid, list(block_names(prompt))), index)
        _, gone = unpack(data, self.instances)
        self.request_locations.gone(gone.rid)
        self.prefixes.ended(gone.dp_rank, gone.blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--live", type=int, default=100_000, help="live requests (%(default)s)")
    parser.add_argument("--turns", type=int, default=20_000, help="turns (%(default)s)")
    options = parser.parse_args()
    columns = ("place", "p99", "boundary", "p99", "turns/s")
    print(f"{'policy':<10}{'instances':>10}" + "".join(f"{c:>10}" for c in columns))
    for policy, lazy in POLICIES.items():
        for instances in (64, 1024):
            cluster = Cluster(instances, lazy)
            for number in range(options.live):
                cluster.arrive(number)
            placed, reasoning_ended, began = [], [], time.perf_counter()
            for turn in range(options.turns):
                cluster.report(turn % instances)
                placed.append(cluster.arrive(options.live + turn))
                reasoning_ended.append(cluster.cross())
                cluster.end()
            per_s = options.turns / (time.perf_counter() - began)
            figures = []
            for took in (placed, reasoning_ended):
                figures += [statistics.mean(took), statistics.quantiles(took, n=100)[98]]
            row = "".join(f"{figure:>10.0f}" for figure in (*figures, per_s))
            print(f"{policy:<10}{instances:>10}{row}", flush=True)


if __name__ == "__main__":
    main()
