"""Do a live server's forecasts hold: `python -m evals.bench.forecasts`.

Sends the load of `evals/arms/live.toml` at three rates to one server of the tiny model after the
other: to one that is told by budgets how long requests think, and to one that is not. Prints what
share of the answers began inside the range from P10 to P90, by when the forecast was made, as
`GET /pascal/status` counts them. Every forecast counts, the first ones too, from which nothing had
been learnt.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from evals.arms import Arm, load_plan, serve
from evals.bench import pair
from evals.compare import target_of
from evals.load import auth, processor
from evals.load.client import Target, open_loop
from pascal_sglang.policy.forecast_errors import OUTCOMES, WHEN

PLAN = Path(__file__).parents[1] / "arms" / "live.toml"
OWN_LENGTHS = "pascal_sglang.demo.budget:TinyOwnLengths"
# Tokens that a request may produce which does not say how many it will.
MOST_TOKENS = 2300
LOADS = (0.7, 1.0, 1.3)

Outcomes = dict[str, Counter[str]]


def outcomes(base_url: str) -> Outcomes:
    """What came of the forecasts of a server's only instance so far, by when they were made."""
    url = f"{base_url}/pascal/status?requests=0"
    request = urllib.request.Request(url, headers=auth.headers())
    with urllib.request.urlopen(request, timeout=30) as reply:
        (instance,) = json.loads(reply.read())["instances"]
    forecast: dict[str, Any] = instance["forecast"] or {"outcomes": {}}
    return {made: Counter(forecast["outcomes"].get(made, {})) for made in WHEN}


def rows(before: Outcomes, after: Outcomes) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for made in WHEN:
        came = {outcome: after[made][outcome] - before[made][outcome] for outcome in OUTCOMES}
        if count := sum(came.values()):
            found.append((made, count, *(f"{100 * n / count:.1f}" for n in came.values())))
    return found


def send(items: Any, target: Target, seed: int) -> None:
    began = time.monotonic()
    records = asyncio.run(open_loop(items, target, seed)).records
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    print(f"  {len(records)} requests in {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=150, help="of each run (%(default)s)")
    parser.add_argument(
        "--sustained", type=float, default=4.0, help="requests per second at load 1 (%(default)s)"
    )
    options, model, budgets = pair.parse(parser)
    plan = dataclasses.replace(load_plan(PLAN), requests=options.requests)
    arm = Arm(name="pascal", command="pascal", role="candidate")
    for name, logit_processor, most in (
        ("with budgets", budgets, None),
        ("without", processor.resolve(OWN_LENGTHS), MOST_TOKENS),
    ):
        with serve(arm, plan, model) as server:
            target = target_of(plan, server, logit_processor)
            target = dataclasses.replace(target, own_lengths=most)
            for seed, load in enumerate(LOADS):
                print(f"\n== {name}, load {load:g}: {load * options.sustained:.1f} requests/s")
                before = outcomes(server.base_url)
                send(plan.items(load * options.sustained, seed), target, seed)
                # What ends last is counted in the pass after it.
                time.sleep(2.0)
                head = ("forecast", "answers", *(f"{outcome} %" for outcome in OUTCOMES))
                print(tabulate(rows(before, outcomes(server.base_url)), head), flush=True)


if __name__ == "__main__":
    with pair.one_line_errors():
        main()
