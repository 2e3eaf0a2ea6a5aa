"""Everything that a GPU changes, in one run with a bound on its time; `check.sh` calls it.

1. identity: forced pauses and moves change no token (`identity.py`);
2. one instance, then two that share the device: SGLang's order against ours under the same load,
   on a real architecture without its weights (on a CPU: the tiny model);
3. what a scheduling pass costs, and what copies of KV cost here (`figures.py`).

Writes `check.json`, `check.txt`, and a page of plots per comparison. A part that there is no time
left for is named, never guessed. Exit code 1 if a part fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import arms
from evals.arms import Arm, Plan, Rate
from evals.compare import CACHE, Comparison
from evals.gpu import device, figures, identity
from evals.load import remote
from evals.load.client import Target
from evals.load.server import ArmError, Server
from evals.options import folder, positive
from evals.provenance import provenance

HERE = Path(__file__).parent
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
# An arm is not begun with less time left than its server's start and half of its load may take.
LEAST_S = {"cuda": 75.0, "cpu": 40.0}
IDENTITY_REQUESTS = {"cuda": 120, "cpu": 40}


class Timed(Comparison):
    """A comparison that begins no arm it has no time for. costs: per arm of ours, what its
    instances measured."""

    def __init__(self, plan: Plan, out: Path, deadline: float, least_s: float) -> None:
        super().__init__(plan, out, verbose=False)
        self.deadline, self.least_s = deadline, least_s
        self.costs: dict[str, list[dict[str, Any]]] = {}

    def run_arm(self, arm: Arm, seed: int, model: Path, processor: str) -> None:
        left = self.deadline - time.monotonic()
        if left < self.least_s:
            raise ArmError(f"not run: {max(0.0, left):.0f} s left")
        self.plan = dataclasses.replace(
            self.plan,
            start_timeout_s=min(self.plan.start_timeout_s, left),
            run_timeout_s=min(self.plan.run_timeout_s, left),
        )
        super().run_arm(arm, seed, model, processor)

    def run_once(self, arm: Arm, rate: Rate, seed: int, server: Server, target: Target) -> None:
        super().run_once(arm, rate, seed, server, target)
        if arm.command == "pascal":
            instances = remote.instances(server.base_url)
            # `fcfs` leaves the order alone, and measures no costs either.
            if all(instance["costs"] for instance in instances):
                self.costs[arm.name] = instances


class Check:
    """The parts, one after the other, and what came of each."""

    def __init__(self, kind: str, out: Path, seconds: float, *, quick: bool) -> None:
        self.kind, self.out, self.quick = kind, out, quick
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.device = device.describe(kind)
        self.lines: list[str] = []
        self.parts: dict[str, Any] = {}
        self.failed: list[str] = []

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def save(self) -> None:
        whole = {
            "device": self.device,
            "seconds": round(time.monotonic() - self.began, 1),
            "failed": self.failed,
            "parts": self.parts,
            "provenance": provenance("evals.gpu.check", sys.argv[1:]),
        }
        (self.out / "check.json").write_text(json.dumps(whole, indent=1) + "\n")
        (self.out / "check.txt").write_text("\n".join(self.lines) + "\n")

    def run(self) -> bool:
        self.say("; ".join(f"{name} {value}" for name, value in self.device.items()))
        self.identity()
        instances = ("one",) if self.quick else ("one", "two")
        for count in instances:
            self.compare(count)
        self.say(f"\n{time.monotonic() - self.began:.0f} s in all; results are in {self.out}")
        for text in self.failed:
            self.say(f"FAILED: {text}")
        self.save()
        return not self.failed

    def identity(self) -> None:
        plan = self.plan("identity")
        try:
            model = arms.model_folder(plan.model, CACHE)
            processor = arms.logit_processor(plan.model)
            found = identity.check(plan, model, processor, IDENTITY_REQUESTS[self.kind])
        except (ArmError, OSError) as error:
            self.failed.append(f"identity: {error}")
            self.parts["identity"] = {"error": str(error)}
        else:
            self.parts["identity"] = dataclasses.asdict(found) | {"holds": found.holds}
            if not found.holds:
                self.failed.append("identity: see its figures")
            for text in figures.identity_lines(found):
                self.say(text)
        self.save()

    def compare(self, count: str) -> None:
        plan = self.plan(count)
        out = self.out / f"{count}.json"
        comparison = Timed(plan, out, self.deadline, LEAST_S[self.kind])
        self.say(f"\n{count} instance{'s' if count == 'two' else ''}")
        try:
            comparison.run_all()
        except (ArmError, OSError) as error:
            self.failed.append(f"{count}: {error}")
        whole = comparison.conclude()
        self.lines += comparison.console
        overhead = {
            run.arm: figures.overhead(run, comparison.costs[run.arm])
            for run in comparison.runs
            if run.arm in comparison.costs
        }
        for text in figures.overhead_lines(overhead):
            self.say(text)
        self.parts[count] = {"whole": whole, "overhead": overhead, "results": out.name}
        if not whole:
            self.failed.append(f"{count}: {comparison.failures or 'token counts differ'}")
        self.save()

    def plan(self, name: str) -> Plan:
        return arms.load_plan(HERE / f"{self.kind}-{name}.toml", quick=self.quick)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evals/gpu/check.sh", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=folder, default=str(CACHE / "check"), help="of the results")
    parser.add_argument("--seconds", type=positive, default=510.0, help="begin nothing after these")
    parser.add_argument("--quick", action="store_true", help="one instance, a short load")
    asked = parser.parse_args(argv)
    # Leaving by an exception takes the running server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    kind = device.kind() if asked.device == "auto" else asked.device
    check = Check(kind, asked.out, asked.seconds, quick=asked.quick)
    try:
        return 0 if check.run() else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
