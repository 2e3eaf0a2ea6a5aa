"""Runs several arms over the same requests and says how they compare.

`python -m evals.compare evals/arms/live.toml [--quick]`. Seeds are the outer loop and arms the
inner one, so that a machine that drifts drifts for all; every (seed, arm) is one server start and
sees all loads. With `--together` all servers are up all the time, those without load asleep, and
arms take turns run by run. Everything printed is also in the JSON file, which is written after
every run, and Ctrl-C compares what ran to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evals import arms, page, workload
from evals.arms import Arm, Plan, Rate, serve
from evals.load import alone, remote
from evals.load.client import LAG_LIMIT_MS, Target, replay
from evals.load.record import Idle
from evals.load.server import ArmError, Server
from evals.load.timeline import details
from evals.options import count, out_file, positive
from evals.provenance import provenance
from evals.reporting import balance, report, verdict
from evals.reporting.metrics import bin_edges, summarize
from evals.reporting.verdict import Run
from evals.workload import Item

CACHE = Path(tempfile.gettempdir()) / "pascal-evals"
WARM_UPS = 4
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def target_of(plan: Plan, server: Server, processor: str) -> Target:
    """The plan's server, as requests are sent to it."""
    return Target(
        base_url=server.base_url,
        logit_processor=processor,
        request_timeout_s=plan.request_timeout_s,
        run_timeout_s=plan.run_timeout_s,
        sampling=plan.sampling,
    )


class Comparison:
    """The state of one comparison, written to its file after every run."""

    def __init__(self, plan: Plan, out: Path, *, verbose: bool, together: bool = False) -> None:
        self.plan, self.out, self.verbose, self.together = plan, out, verbose, together
        self.fitted = False
        self.runs: list[Run] = []
        self.failures: dict[str, str] = {}
        self.console: list[str] = []
        self.results: dict[str, Any] = {}
        self.idle: Idle | None = None
        lengths = [i.thinking_tokens for s in range(plan.seeds) for i in self.items(s, 1.0)]
        self.edges = bin_edges(lengths, plan.bins)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.console.append(text)

    def items(self, seed: int, per_s: float) -> list[Item]:
        return self.plan.items(per_s, seed)

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(
            json.dumps(
                {
                    "plan": dataclasses.asdict(self.plan),
                    "idle": dataclasses.asdict(self.idle) if self.idle else None,
                    "bin_edges": self.edges,
                    "failed_arms": self.failures,
                    "runs": [dataclasses.asdict(run) for run in self.runs],
                    "comparison": self.results,
                    "console": self.console,
                    "provenance": provenance("evals.compare", sys.argv[1:]),
                },
                indent=1,
            )
        )

    def run_all(self) -> None:
        plan = self.plan
        for text in plan.describe():
            self.say(text)
        self.say("bins of thinking tokens: " + ", ".join(report.bin_names(self.edges)))
        model = arms.models(plan, CACHE)
        processor = arms.processor_of(plan)
        if self.together:
            self.run_together(model, processor)
            return
        for seed in range(plan.seeds):
            for arm in plan.arms:
                if arm.name not in self.failures:
                    with self.giving_up(arm):
                        self.run_arm(arm, seed, model, processor)

    def serve(self, arm: Arm, model: Path) -> contextlib.AbstractContextManager[Server]:
        """The arm's server, which starts now."""
        return serve(arm, self.plan, model)

    def run_arm(self, arm: Arm, seed: int, model: Path, processor: str) -> None:
        began = time.monotonic()
        with self.serve(arm, model) as server:
            self.say(f"{arm.name}, seed {seed}: server up in {time.monotonic() - began:.0f} s")
            target = self.prepare(arm, server, processor)
            for rate in self.plan.rates:
                self.run_once(arm, rate, seed, server, target)

    def run_together(self, model: Path, processor: str) -> None:
        plan, began = self.plan, time.monotonic()
        with contextlib.ExitStack() as stack:
            # All begin to start before the first one is waited for.
            starting = [(arm, self.serve(arm, model)) for arm in plan.arms]
            up: list[tuple[Arm, Server]] = []
            for arm, server in starting:
                with self.giving_up(arm):
                    up.append((arm, stack.enter_context(server)))
            self.say(f"{len(up)} servers up in {time.monotonic() - began:.0f} s")
            ready: list[tuple[Arm, Server, Target]] = []
            for arm, server in up:
                with self.giving_up(arm):
                    ready.append((arm, server, self.prepare(arm, server, processor)))
            for seed, rate in itertools.product(range(plan.seeds), self.plan.rates):
                for arm, server, target in ready:
                    if arm.name not in self.failures:
                        with self.giving_up(arm):
                            self.run_once(arm, rate, seed, server, target)

    def prepare(self, arm: Arm, server: Server, processor: str) -> Target:
        """Warm the server up. The first one decides what a request takes alone, and the loads."""
        target = target_of(self.plan, server, processor)
        self.measure_idle(arm, target)
        if self.plan.sustained_per_s and not self.fitted:
            server.flush()
            self.fit_loads(arm, target)
            self.fitted = True
        return target

    @contextlib.contextmanager
    def giving_up(self, arm: Arm) -> Iterator[None]:
        """The other arms go on without one that fails."""
        try:
            yield
        except (ArmError, OSError) as error:
            self.failures[arm.name] = str(error)
            self.say(f"{arm.name}: gave up: {error}")

    def fit_loads(self, arm: Arm, target: Target) -> None:
        """Scale the loads to this machine: what the arm does with everybody there at once, between
        a fifth and four fifths of its tokens, when neither the first prefills nor the last
        stragglers count."""
        items = [dataclasses.replace(i, arrival_s=0.0) for i in self.items(alone.SEED, 1.0)]
        back = replay(items, target, seed=alone.SEED)
        at_s = sorted(at for record in back.records for at in record.token_s)
        fifth = len(at_s) // 5
        took_s = at_s[-fifth - 1] - at_s[fifth] if fifth else 0.0
        if not took_s > 0:
            raise ArmError("no answer to a burst of requests, by which loads are chosen")
        sustained = (len(at_s) - 2 * fifth) / took_s / (len(at_s) / len(items))
        self.plan = self.plan.scaled_to(sustained)
        self.say(f"{arm.name} sustains {sustained:.2f} requests/s here; {self.plan.loads()}")

    def measure_idle(self, arm: Arm, target: Target) -> None:
        """Every server is asked the same, so that all are equally warm; the first one's times are
        those of a request alone."""
        error = alone.warm_up(WARM_UPS, target)
        seen = None if error else alone.measure(target)
        if seen is None:
            raise ArmError(f"no answer from an idle server: {error or 'it answers too little'}")
        if self.idle is None:
            self.idle = seen
            self.say(f"alone on {arm.name}: TTFO = {seen}")

    def run_once(self, arm: Arm, rate: Rate, seed: int, server: Server, target: Target) -> None:
        server.flush()
        items = self.items(seed, rate.per_s)
        before = remote.counters(server.base_url)
        with balance.watching(server.base_url) as seen:
            back = replay(items, target, seed=seed)
        counters = remote.change(before, remote.counters(server.base_url))
        summary = summarize(
            back.records,
            items,
            idle=self.idle,
            target_tpot_s=self.plan.target_tpot_ms / 1e3,
            edges=self.edges,
            goodput_ms=self.plan.goodput_ms,
        )
        summary |= details(back.records, items) | seen.summary()
        summary["moves_per_request"] = report.migrations(counters) / len(items)
        tokens = [len(record.token_s) for record in back.records]
        self.runs.append(Run(arm.name, rate.name, seed, summary, tokens, counters, back.lag_p99_ms))
        if self.verbose:
            for line in report.lines(summary, f"{arm.name}, {rate.name}, seed {seed}", self.edges):
                self.say(line)
        else:
            self.say(f"  {arm.name}, {rate.name}, seed {seed}: {report.short(summary)}")
        moved = report.totals(counters).items()
        shown = ", ".join(f"{name} {value:.0f}" for name, value in moved if value)
        late = ", TOO LATE TO TRUST" if back.lag_p99_ms > LAG_LIMIT_MS else ""
        self.say(
            f"            load average {os.getloadavg()[0]:.1f}, "
            f"client lag p99 {back.lag_p99_ms:.1f} ms{late}{shown and '; '}{shown}"
        )
        self.save()

    def conclude(self) -> bool:
        """Print and keep the comparison; whether everything ran and no count of tokens differs."""
        self.say()
        wrong = verdict.token_mismatches(self.runs)
        for text in wrong:
            self.say(f"OUTPUT DIFFERS: {text}")
        if not wrong:
            self.say("all arms gave the same number of output tokens for every item")
        late = [r for r in self.runs if r.lag_p99_ms > LAG_LIMIT_MS]
        for run in late:
            self.say(f"CLIENT LATE: {run.arm}, {run.rate}, seed {run.seed}: do not trust its times")
        for name, reason in self.failures.items():
            self.say(f"GAVE UP: {name}: {reason}")
        self.results = {"token_mismatches": wrong, "loads": {}}
        for rate in self.plan.rates:
            self.results["loads"][rate.name] = self.compare_load(rate)
        self.save()
        self.say(f"written to {self.out}")
        if self.runs:
            page.write([self.out], self.out.with_suffix(".html"))
            self.say(f"and {self.out.with_suffix('.html')}")
        return not wrong and not self.failures

    def compare_load(self, rate: Rate) -> dict[str, Any]:
        ran = {run.arm for run in self.runs if run.rate == rate.name}
        present = [arm for arm in self.plan.arms if arm.name in ran]
        stock = [arm.name for arm in present if arm.role == "stock"]
        oracle = next((arm.name for arm in present if arm.role == "oracle"), None)
        self.say(f"\n{f' {rate.name}: {rate.per_s:g} requests/s ':=^100}")
        found: dict[str, Any] = {}
        for arm in present:
            found[arm.name] = self.compare_arm(arm, rate, stock, oracle)
        for arm in present:
            if arm.role == "candidate" and stock:
                self.say(f"verdict on {arm.name} at {rate.name}:")
                targets = verdict.verdict(
                    self.runs, arm, rate, stock, len(self.edges) + 1, self.plan.targets
                )
                for target in targets:
                    self.say(f"  {target}")
                found[arm.name]["verdict"] = [dataclasses.asdict(t) for t in targets]
        return found

    def compare_arm(
        self, arm: Arm, rate: Rate, stock: Sequence[str], oracle: str | None
    ) -> dict[str, Any]:
        """Means over seeds, and ratios to the best stock arm of each figure."""
        found: dict[str, Any] = {"ratios": {}}
        self.say(f"{arm.name}")
        names = report.bin_names(self.edges)
        figures = [
            ("mean TTFO (s)", verdict.key("mean_ttfo_ms"), 1e-3, False),
            ("mean TTFT (s)", verdict.key("mean_ttft_ms"), 1e-3, False),
            ("P99 slowdown", verdict.key("p99_slowdown"), 1.0, False),
            *(
                (f"tail TTFO {name} (s)", verdict.bin_tail(i), 1.0, False)
                for i, name in enumerate(names)
            ),
            ("throughput (tok/s)", verdict.key("output_throughput"), 1.0, True),
            ("in window (tok/s)", verdict.key("window_output_throughput"), 1.0, True),
            ("SLO violations (%)", verdict.key("slo_violations"), 100.0, False),
            ("P99 blocking (ms)", verdict.key("p99_blocking_ms"), 1.0, False),
            ("KV imbalance (%)", verdict.key("kv_imbalance"), 100.0, False),
            ("moves per request", verdict.key("moves_per_request"), 1.0, False),
        ]
        for label, read, unit, higher in figures:
            value = verdict.mean(self.runs, arm.name, rate.name, read)
            base = verdict.best(self.runs, stock, rate.name, read, higher=higher)
            ratio = verdict.ratio(self.runs, arm.name, base, rate.name, read)
            shown = report.line(f"  {label}:", None if value is None else value * unit)
            self.say(f"{shown:<52}" + (f"{ratio} x {base}" if ratio else ""))
            found["ratios"][label] = {
                "mean": value,
                "base": base,
                "ratio": dataclasses.asdict(ratio) if ratio else None,
            }
        closed = verdict.gap_closed(self.runs, arm.name, stock, oracle, rate.name)
        if arm.role == "candidate" and closed is not None:
            self.say(report.line("  oracle gap closed (%):", 100 * closed))
        found["gap_closure"] = closed
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare arms over the same requests.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--quick", action="store_true", help="the plan's [quick] table")
    parser.add_argument("--arms", type=_names, help="comma-separated names")
    parser.add_argument("--rates", type=_names, help="comma-separated names")
    parser.add_argument("--seeds", type=count, help="how many seeds")
    parser.add_argument("--requests", type=count, help="per run")
    parser.add_argument(
        "--together",
        action="store_true",
        help="all servers at once; those without load should sleep (`--sleep-on-idle`)",
    )
    parser.add_argument(
        "--target-tpot-ms",
        type=positive,
        help="the reader's pace, for a machine much slower or faster than the plan's",
    )
    parser.add_argument("--out", type=out_file, help="JSON file")
    parser.add_argument("--verbose", action="store_true", help="the full report of every run")
    asked = parser.parse_args(argv)
    try:
        plan = arms.load_plan(
            asked.plan,
            quick=asked.quick,
            arms=asked.arms,
            rates=asked.rates,
            seeds=asked.seeds,
            requests=asked.requests,
            target_tpot_ms=asked.target_tpot_ms,
        )
    except (ArmError, OSError, ValueError, TypeError) as error:
        print(f"evals: error: {asked.plan}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    # Leaving by an exception takes the running server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        out = asked.out or out_file(str(CACHE / f"{asked.plan.stem}.json"))
        comparison = Comparison(plan, out, verbose=asked.verbose, together=asked.together)
    except (workload.WorkloadError, argparse.ArgumentTypeError) as error:
        print(f"evals: error: {asked.plan}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    interrupted = False
    try:
        comparison.run_all()
    except KeyboardInterrupt:
        interrupted = True
        comparison.say("interrupted: what ran to its end is compared")
    except (ArmError, OSError) as error:
        print(f"evals: error: {asked.plan}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    whole = comparison.conclude()
    return EXIT_INTERRUPTED if interrupted else 0 if whole else EXIT_FAILED


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
