"""A light tenant beside a heavy one, without fairness and with it: `python -m evals.bench.tenants`.

Sends one overload to one server of the tiny model again and again, and switches fairness by
`PUT /pascal/config` in between. Prints the TTFO of both tenants, and Jain's index as the simulator
takes it (`pascal_sglang.sim.tenants`): over what each got until the last request was due, as a
share of what it should have got.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evals.arms import Arm, load_plan, serve
from evals.bench import pair
from evals.compare import target_of
from evals.load import auth
from evals.load.client import Target, open_loop
from evals.load.items import Item
from evals.load.record import Record
from pascal_sglang.sim.tenants import fair_shares, jain

PLAN = Path(__file__).parents[1] / "arms" / "live.toml"
HEADER = "X-Tenant"
FAIRNESS = {"off": "off", "on": f"header:{HEADER}"}
# What the tiny model needs for a token alone on this machine's reference platform, in seconds.
ALONE_S = 0.0025

Tenants = Mapping[str, Sequence[Item]]
Replies = Mapping[str, Sequence[Record]]


def split(items: Sequence[Item], weight: float, seed: int) -> dict[str, list[Item]]:
    """The same requests at the same times, `weight` of them from one tenant for each of the
    other's."""
    light = np.random.default_rng([seed, 6]).random(len(items)) < 1 / (1 + weight)
    mine: dict[str, list[Item]] = {"heavy": [], "light": []}
    for item, is_light in zip(items, light, strict=True):
        mine["light" if is_light else "heavy"].append(item)
    return mine


def switch(base_url: str, fairness: str) -> None:
    body = json.dumps({"fairness": fairness}).encode()
    url, headers = f"{base_url}/pascal/config", auth.headers()
    request = urllib.request.Request(url, body, headers, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as reply:
        reply.read()


async def send(tenants: Tenants, target: Target) -> dict[str, list[Record]]:
    """All tenants at once, each under its name."""
    loops = [
        open_loop(items, dataclasses.replace(target, headers={HEADER: name}), seed=number)
        for number, (name, items) in enumerate(tenants.items())
    ]
    replays = await asyncio.gather(*loops)
    return {name: back.records for name, back in zip(tenants, replays, strict=True)}


def ttfo_s(records: Sequence[Record]) -> list[float]:
    failed = [record.error for record in records if not record.answer_s]
    if failed:
        raise SystemExit(f"a request failed: {failed[0]}")
    return [record.answer_s[0] - record.arrival_s for record in records]


def index(tenants: Tenants, replies: Replies) -> float:
    """Jain's index of one run."""
    until = max(item.arrival_s for items in tenants.values() for item in items)
    got, asked = [], []
    for name, items in tenants.items():
        got.append(float(sum(at <= until for r in replies[name] for at in r.token_s)))
        tokens = [item.thinking_tokens + 1 + item.answer_tokens for item in items]
        alone = [(until - item.arrival_s) / ALONE_S for item in items]
        asked.append(float(sum(map(min, tokens, alone))))
    return jain([a / max(1.0, b) for a, b in zip(got, fair_shares(asked, sum(got)), strict=True)])


def row(name: str, runs: Sequence[tuple[Tenants, Replies]]) -> str:
    shown = [f"{statistics.mean(index(*run) for run in runs):>9.3f}"]
    for tenant in runs[0][0]:
        found = [s for _, replies in runs for s in ttfo_s(replies[tenant])]
        shown.append(
            f"{len(found):>7}{statistics.mean(found):>9.2f}{np.percentile(found, 90):>9.2f}"
        )
    return f"{name:<10}{''.join(shown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=110, help="of each run (%(default)s)")
    parser.add_argument("--rate", type=float, default=6.3, help="requests per second (%(default)s)")
    parser.add_argument("--weight", type=float, default=10.0, help="of the heavy tenant")
    parser.add_argument("--rounds", type=int, default=3, help="runs without and with (%(default)s)")
    options, model, processor = pair.parse(parser)
    plan = dataclasses.replace(load_plan(PLAN), requests=options.requests)
    arm = Arm(name="pascal", command="pascal", role="candidate")
    runs: dict[str, list[tuple[Tenants, Replies]]] = {name: [] for name in FAIRNESS}
    with serve(arm, plan, model) as server:
        target = target_of(plan, server, processor)
        for number in range(options.rounds):
            items = plan.items(options.rate, number)
            tenants = split(items, options.weight, number)
            # Each goes first in every other round.
            for name in list(FAIRNESS)[:: 1 if number % 2 == 0 else -1]:
                switch(server.base_url, FAIRNESS[name])
                runs[name].append((tenants, asyncio.run(send(tenants, target))))
    head = "".join(f"{tenant:>7}{'TTFO s':>9}{'P90':>9}" for tenant in ("heavy", "light"))
    print(f"{'fairness':<10}{'Jain':>9}{head}")
    for name, found in runs.items():
        print(row(name, found))


if __name__ == "__main__":
    with pair.one_line_errors():
        main()
