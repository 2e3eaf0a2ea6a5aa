"""Whether `evals.serving` and `sglang.benchmark.serving` see the same of the same server.

`python -m evals.bench.agreement evals/arms/ample.toml --arms fcfs,pascal`. Both replay the same
prompts and lengths in the same order at the same times, in turn, several pairs a load, against one
server per arm. Printed is what we see over what they see, pair by pair, beside how far each tool
strays from itself: a ratio inside that is noise. Exit codes: 0, 1 when the two did not do the same
work, 2 for bad input or a failed run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from evals import arms, workload
from evals.arms import Arm, Plan, serve
from evals.load.items import Item
from evals.load.server import ArmError, Server, environment
from evals.options import count
from evals.reporting.verdict import Spread

KEYS = (
    "mean_ttft_ms",
    "median_ttft_ms",
    "mean_itl_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "mean_tpot_ms",
    "mean_e2e_latency_ms",
    "output_throughput",
)
SAME = ("completed", "total_input_tokens", "total_output_tokens", "output_lens")
SEED = 1
TIMEOUT_S = 300
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


class Load(NamedTuple):
    """per_s: requests per second, Poisson, or infinite: no gaps. concurrency: the most at one time,
    None for no bound."""

    per_s: float
    concurrency: int | None

    def __str__(self) -> str:
        rate = f"{self.per_s:g}/s" if math.isfinite(self.per_s) else "no gaps"
        return rate if self.concurrency is None else f"{rate}, {self.concurrency} at a time"


class Bench(NamedTuple):
    """Where and what both tools run; the files in `folder` are named after them."""

    base_url: str
    model: Path
    folder: Path
    requests: int


def requests(plan: Plan, load: Load) -> list[Item]:
    """What both replay, at the gaps that their seeded generator draws."""
    drawn = workload.generate(plan.preset, plan.requests, 1.0, SEED, scale=plan.scale)
    gaps_s = np.random.RandomState(SEED).exponential(1 / load.per_s, len(drawn))
    dice = random.Random(SEED)
    return [
        Item(
            arrival_s=float(at),
            prompt_tokens=item.prompt_tokens,
            thinking_tokens=item.thinking_tokens,
            answer_tokens=item.answer_tokens,
            # The tiny model has a token for every letter.
            prompt="".join(dice.choices(string.ascii_lowercase, k=item.prompt_tokens)),
        )
        for item, at in zip(drawn, np.cumsum([0.0, *gaps_s[:-1]]), strict=True)
    ]


def write_theirs(wanted: Sequence[Item], path: Path) -> None:
    """Their custom data set. An output is as long as the text that answers, and they shuffle all of
    it with Python's seeded generator."""
    order = list(range(len(wanted)))
    random.Random(SEED).shuffle(order)
    lines = [""] * len(wanted)
    for item, place in zip(wanted, order, strict=True):
        turns = [{"content": item.prompt}, {"content": "a" * item.output_tokens}]
        lines[place] = json.dumps({"conversations": turns})
    path.write_text("\n".join(lines) + "\n")


def ours(bench: Bench, load: Load) -> dict[str, Any]:
    rate = ["--request-rate", "inf"] if math.isinf(load.per_s) else []
    file = str(bench.folder / "ours.jsonl")
    return _run("evals.serving", bench, load, ["--dataset-name", file, "--no-idle-fit", *rate])


def theirs(bench: Bench, load: Load) -> dict[str, Any]:
    more = [
        *("--backend", "sglang", "--dataset-name", "custom"),
        *("--dataset-path", str(bench.folder / "theirs.jsonl")),
        *("--request-rate", str(load.per_s)),
        *("--model", str(bench.model), "--tokenizer", str(bench.model)),
        *("--extra-request-body", json.dumps({"require_reasoning": True})),
    ]
    return _run("sglang.benchmark.serving", bench, load, more)


def _run(module: str, bench: Bench, load: Load, more: Sequence[str]) -> dict[str, Any]:
    """The last line of the tool's result file. Raises ArmError."""
    out = bench.folder / f"{module}.jsonl"
    command = [
        *(sys.executable, "-m", module, "--base-url", bench.base_url, "--seed", str(SEED)),
        *("--num-prompts", str(bench.requests), "--warmup-requests", "1", "--disable-tqdm"),
        *("--output-details", "--output-file", str(out), *more),
    ]
    if load.concurrency is not None:
        command += ["--max-concurrency", str(load.concurrency)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment({}), timeout=TIMEOUT_S
    )
    if done.returncode:
        raise ArmError(f"{module}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    seen: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return seen


def compare(
    server: Server, bench: Bench, load: Load, pairs: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What we and they saw, a run per pair; whoever is first in one pair is second in the next."""
    tools: list[Callable[[Bench, Load], dict[str, Any]]] = [ours, theirs]
    seen: dict[Callable[[Bench, Load], dict[str, Any]], list[dict[str, Any]]] = {
        tool: [] for tool in tools
    }
    for pair in range(pairs):
        for tool in tools if pair % 2 == 0 else reversed(tools):
            server.flush()
            seen[tool].append(tool(bench, load))
    return seen[ours], seen[theirs]


def table(we: Sequence[dict[str, Any]], they: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: mean of each tool with its own range, and our figure over theirs."""
    rows = []
    for key in KEYS:
        both = [[run[key] for run in runs] for runs in (we, they)]
        cells = [f"{sum(v) / len(v):.2f} ({min(v):.2f}..{max(v):.2f})" for v in both]
        ratio = Spread.of([a / b for a, b in zip(*both, strict=True)]) or "n/a"
        rows.append([key, *cells, str(ratio)])
    heads = ["", "ours", "theirs", "ours / theirs"]
    lines: list[str] = tabulate(rows, heads, tablefmt="plain", disable_numparse=True).splitlines()
    return lines


def differences(we: Sequence[dict[str, Any]], they: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which any run did other work than the first."""
    return [key for key in SAME if any(run[key] != we[0][key] for run in (*we, *they))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare evals.serving with sglang.benchmark.serving."
    )
    parser.add_argument("plan", type=Path, help="TOML of arms, as for evals.compare")
    parser.add_argument("--arms", default="fcfs,pascal", help="comma-separated names")
    parser.add_argument("--requests", type=count, default=60, help="per run")
    parser.add_argument("--pairs", type=count, default=4, help="per load")
    parser.add_argument("--rate", type=float, default=5.0, help="requests per second, open loop")
    parser.add_argument("--concurrency", type=count, default=16, help="at one time, closed loop")
    asked = parser.parse_args(argv)
    loads = (
        Load(asked.rate, None),
        Load(math.inf, asked.concurrency),
        Load(math.inf, None),
    )
    same = True
    # Leaving by an exception takes the running server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        plan = arms.load_plan(asked.plan, arms=asked.arms.split(","), requests=asked.requests)
        with tempfile.TemporaryDirectory() as folder:
            model = arms.models(plan, Path(folder))
            for arm in plan.arms:
                same &= measure(plan, arm, model, loads, asked.pairs)
    except (ArmError, OSError, ValueError, TypeError, subprocess.TimeoutExpired) as error:
        print(f"evals: error: {asked.plan}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0 if same else EXIT_FAILED


def measure(plan: Plan, arm: Arm, model: Path, loads: Sequence[Load], pairs: int) -> bool:
    """Print every load of one arm; whether both tools did the same work."""
    same = True
    with serve(arm, plan, model) as server, tempfile.TemporaryDirectory() as folder:
        for load in loads:
            bench = Bench(server.base_url, model, Path(folder), plan.requests)
            wanted = requests(plan, load)
            workload.save(wanted, bench.folder / "ours.jsonl")
            write_theirs(wanted, bench.folder / "theirs.jsonl")
            we, they = compare(server, bench, load, pairs)
            wrong = differences(we, they)
            lines = [
                f"\n{arm.name}, {load}, {plan.requests} requests, {pairs} pairs",
                *table(we, they),
                f"NOT THE SAME WORK: {', '.join(wrong)}" if wrong else "same work, item by item",
            ]
            print("\n".join(lines), flush=True)
            same &= not wrong
    return same


if __name__ == "__main__":
    sys.exit(main())
