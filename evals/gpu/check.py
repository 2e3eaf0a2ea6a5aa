"""Everything that a GPU changes, in one run with a bound on its time; `check.sh` calls it.

The parts, in the order of what they prove per second:

1. probe: copies, pinning and the order of streams, without a server (`probe.py`);
2. identity: forced pauses, moves and aborts change no token, with FlashInfer (`identity.py`);
3. prefixes: the same with Triton, and prompts that share beginnings;
4. order: SGLang's order against ours under the same load, on a real architecture without its
   weights, with little memory;
5. overhead: the same with ample memory: what scheduling costs when it decides nothing;
6. moves: how long a move keeps a reader waiting, by the size of its KV (`moves.py`).

On a CPU all of them run with the tiny model and small loads. Kernels are built beside the probe, in
parallel; servers begin to start as early as memory allows, side by side. What is measured in time
waits until no server starts. Writes `check.json` and `check.txt` as results come, and a page of
plots per comparison. A part that there is no time left for is named, never guessed. Exit code 1 if
a part fails or is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import arms
from evals.arms import Arm, Plan, Rate
from evals.compare import CACHE, Comparison, target_of
from evals.gpu import device, figures, identity, kernels, kit, moves
from evals.gpu.servers import Key, Servers, key_of
from evals.load import remote
from evals.load.client import Target
from evals.load.server import SUPERVISE, ArmError, Server, environment
from evals.options import folder, positive
from evals.provenance import provenance

HERE = Path(__file__).parent
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
SECONDS = 545.0
PROBE_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between devices.

    plans: name of the TOML by part, where it is not the part's. rates: the loads of a plan that a
    part takes, where it has several. gib: device memory that a part's own servers take, in the
    order of parts; of a CPU, host memory. least_s: a part is not begun with less time left, nor a
    run of one without `run_s`. requests: of an identity check. prompts: tokens, of moves.
    """

    plans: Mapping[str, str]
    rates: Mapping[str, str]
    gib: Mapping[str, float]
    least_s: Mapping[str, float]
    run_s: float
    requests: int
    prompts: tuple[int, ...]
    moved: int


KINDS = {
    "cuda": Kind(
        plans={},
        rates={},
        gib={"identity": 8.0, "prefixes": 8.0, "order": 40.0, "overhead": 54.0, "moves": 46.0},
        least_s={
            **{"probe": 10.0, "identity": 40.0, "prefixes": 40.0},
            **{"order": 60.0, "overhead": 40.0, "moves": 40.0},
        },
        run_s=20.0,
        requests=120,
        prompts=(1000, 3000, 8000),
        moved=24,
    ),
    "cpu": Kind(
        plans={"prefixes": "identity", "overhead": "order"},
        rates={"order": "high", "overhead": "low"},
        gib={"identity": 8.0, "prefixes": 0.0, "order": 3.5, "overhead": 0.0, "moves": 5.0},
        least_s={
            **{"probe": 10.0, "identity": 30.0, "prefixes": 30.0},
            **{"order": 30.0, "overhead": 20.0, "moves": 20.0},
        },
        run_s=10.0,
        requests=24,
        prompts=(300, 1200),
        moved=8,
    ),
}


class Timed(Comparison):
    """A comparison on servers that are there, which begins no run that it has no time for.

    costs: per arm of ours, what its instances measured.
    """

    def __init__(
        self, plan: Plan, out: Path, deadline: float, least_s: float, check: Check | None = None
    ) -> None:
        super().__init__(plan, out, verbose=False, together=True)
        self.deadline, self.least_s, self.check = deadline, least_s, check
        self.costs: dict[str, list[dict[str, Any]]] = {}

    def say(self, text: str = "") -> None:
        self.console.append(text)
        if self.check is not None:
            self.check.say(text)

    @contextlib.contextmanager
    def serve(self, arm: Arm, model: Path) -> Iterator[Server]:
        assert self.check is not None
        yield self.check.server(arm, self.plan, model)

    def run_once(self, arm: Arm, rate: Rate, seed: int, server: Server, target: Target) -> None:
        left = self.deadline - time.monotonic()
        if left < self.least_s:
            raise ArmError(f"seed {seed} not run: {max(0.0, left):.0f} s left")
        bounded = min(target.run_timeout_s, left)
        target = dataclasses.replace(target, run_timeout_s=bounded)
        super().run_once(arm, rate, seed, server, target)
        if arm.command == "pascal":
            instances = remote.instances(server.base_url)
            # `fcfs` leaves the order alone, and measures no costs either.
            if all(instance["costs"] for instance in instances):
                self.costs[arm.name] = instances


@dataclass(frozen=True, slots=True)
class Part:
    """run: does the part; what it returns stands in `check.json` under its name. servers: those
    that it needs. timed: whether servers that start would disturb it."""

    name: str
    run: Callable[[], dict[str, Any]]
    plan: Plan | None = None
    servers: tuple[Arm, ...] = ()
    timed: bool = False


class PartError(RuntimeError):
    """A part ran, and what it found is not as it should be."""


class Check:
    """The parts, one after the other, and what came of each."""

    def __init__(
        self,
        kind: str,
        out: Path,
        seconds: float,
        only: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """env: more of the environment of servers."""
        self.kind, self.out, self.of, self.env = kind, out, KINDS[kind], env or {}
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.device = device.describe(kind)
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []
        self.servers = Servers()
        self._provenance = provenance("evals.gpu.check", sys.argv[1:])
        self._pool = ThreadPoolExecutor()
        self._models: dict[str, tuple[Future[Path], Future[str]]] = {}
        self._text = (out / "check.txt").open("w")
        self.parts = [part for part in self._all_parts() if not only or part.name in only]

    def _all_parts(self) -> Iterator[Part]:
        yield Part("probe", self.probe)
        for name in ("identity", "prefixes"):
            plan = self.plan(name)
            both = (plan.arms[0], identity.forced(plan))
            yield Part(name, functools.partial(self.identity, name, plan), plan, both)
        for name in ("order", "overhead"):
            plan = self.plan(name)
            run = functools.partial(self.compare, name, plan)
            yield Part(name, run, plan, plan.arms, timed=True)
        plan = self.plan("moves")
        run = functools.partial(self.moves, plan)
        yield Part("moves", run, plan, (moves.moving(plan),), timed=True)

    def plan(self, name: str) -> Plan:
        path = HERE / f"{self.kind}-{self.of.plans.get(name, name)}.toml"
        rate = self.of.rates.get(name)
        plan = arms.load_plan(path, rates=[rate] if rate else None)
        return dataclasses.replace(plan, env={**plan.env, **self.env})

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        print(text, file=self._text, flush=True)

    def save(self) -> None:
        whole = {
            "device": self.device,
            "seconds": round(time.monotonic() - self.began, 1),
            "failed": self.failed,
            "parts": self.results,
            "provenance": self._provenance,
        }
        (self.out / "check.json").write_text(json.dumps(whole, indent=1) + "\n")

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self) -> bool:
        self.say("; ".join(f"{name} {value}" for name, value in self.device.items()))
        for part in self.parts:
            if part.plan is not None:
                self._prepare(part.plan)
        with self._pool, self.servers, self.kernels():
            for place, part in enumerate(self.parts):
                self._run_part(part, self.parts[place:])
        self.say(f"\n{time.monotonic() - self.began:.0f} s in all; results are in {self.out}")
        for text in self.failed:
            self.say(f"FAILED: {text}")
        self.save()
        return not self.failed

    def _run_part(self, part: Part, rest: Sequence[Part]) -> None:
        """rest: this part and those after it."""
        self.say(f"\n{part.name}, after {time.monotonic() - self.began:.0f} s")
        began = time.monotonic()
        found: dict[str, Any] = {}
        self.results[part.name] = found
        try:
            if self.left < self.of.least_s[part.name]:
                raise ArmError(f"not run: {max(0.0, self.left):.0f} s left")
            if part.servers:
                self._begin(rest)
            if part.timed:
                self.servers.settle()
            found |= part.run()
        except (ArmError, OSError, PartError) as error:
            self.failed.append(f"{part.name}: {error}")
            self.say(f"{part.name}: {error}")
            found.setdefault("error", str(error))
        found["seconds"] = round(time.monotonic() - began, 1)
        self.servers.end_all_but({key for other in rest[1:] for key in self._keys(other)})
        self.save()

    def _begin(self, rest: Sequence[Part]) -> None:
        """Begin the servers of the first part and, while memory lasts, of those after it; the
        first alone, if it would have to wait for them."""
        left_gib = device.memory_gib(self.kind)
        if rest[0].timed:
            rest = rest[:1]
        for place, part in enumerate(rest):
            left_gib -= self.of.gib.get(part.name, 0.0)
            if part.plan is None or (place and left_gib < 0):
                return
            bounded = dataclasses.replace(
                part.plan, start_timeout_s=min(part.plan.start_timeout_s, max(1.0, self.left))
            )
            for arm in part.servers:
                self.servers.begin(arm, bounded, self.model(part.plan))

    def _keys(self, part: Part) -> Iterator[Key]:
        """None for a model that cannot be built, which that part will tell."""
        for arm in part.servers:
            assert part.plan is not None
            with contextlib.suppress(ArmError, OSError):
                yield key_of(arm, part.plan, self.model(part.plan))

    def _prepare(self, plan: Plan) -> tuple[Future[Path], Future[str]]:
        """Have the plan's model and its logit processor made, beside all that is done meanwhile."""
        if plan.model not in self._models:
            self._models[plan.model] = (
                self._pool.submit(arms.model_folder, plan.model, CACHE),
                self._pool.submit(arms.logit_processor, plan.model),
            )
        return self._models[plan.model]

    def model(self, plan: Plan) -> Path:
        """Its folder. Raises: ArmError, OSError."""
        return self._prepare(plan)[0].result()

    def processor(self, plan: Plan) -> str:
        """The model's logit processor. Raises: ArmError."""
        return self._prepare(plan)[1].result()

    def server(self, arm: Arm, plan: Plan, model: Path) -> Server:
        """The one that was begun, once it answers. Raises: ArmError."""
        began = time.monotonic()
        server = self.servers.wait(key_of(arm, plan, model))
        waited = time.monotonic() - began
        if waited > 1:
            self.say(f"{arm.name}: waited {waited:.0f} s until its server was up")
        return server

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Have the kernels of all parts built, beside all that is done meanwhile."""
        if self.kind != "cuda":
            yield
            return
        log = self.out / "kernels.txt"
        # With all the compilers that it starts, it ends when its input is closed.
        supervised = [sys.executable, str(SUPERVISE), "--stop-timeout", "5"]
        command = [*supervised, sys.executable, "-m", "evals.gpu.kernels"]
        with log.open("wb") as output:
            building = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment({}),
            )
        try:
            yield
        finally:
            assert building.stdin is not None
            building.stdin.close()
            building.wait(30)
            self.say("\nkernels")
            self.say(log.read_text(errors="replace").rstrip())

    def probe(self) -> dict[str, Any]:
        """What `evals.gpu.probe` finds, told line by line."""
        command = [sys.executable, "-m", "evals.gpu.probe", "--device", self.kind]
        found: dict[str, Any] = {}
        other = ""
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(arms.STOCK_ON_CPU if self.kind == "cpu" else {}),
        ) as process:
            limit = threading.Timer(min(PROBE_TIMEOUT_S, self.left), process.kill)
            limit.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    told = figures.probe_line(line)
                    if told is None:
                        other = line.strip() or other
                        continue
                    found[told["name"]] = told
                    self.say(figures.probe_text(told))
                    self.results["probe"] |= found
                    self.save()
            except BaseException:
                process.kill()
                raise
            finally:
                limit.cancel()
        if process.returncode:
            raise PartError(f"the probe ended with {process.returncode}: {other}")
        wrong = [name for name, told in found.items() if told["holds"] is False]
        if wrong:
            raise PartError(f"does not hold: {', '.join(wrong)}")
        return found

    def identity(self, name: str, plan: Plan) -> dict[str, Any]:
        model, processor = self.model(plan), self.processor(plan)
        stock = self.server(plan.arms[0], plan, model)
        forced = self.server(identity.forced(plan), plan, model)
        requests = identity.bodies(self.of.requests, processor, shared=name == "prefixes")
        found = identity.check(stock.base_url, forced.base_url, requests, self.left)
        for text in figures.identity_lines(found):
            self.say(text)
        self.results[name] |= dataclasses.asdict(found) | {"holds": found.holds}
        if not found.holds:
            raise PartError("see its figures")
        return {}

    def compare(self, name: str, plan: Plan) -> dict[str, Any]:
        out = self.out / f"{name}.json"
        comparison = Timed(plan, out, self.deadline, self.of.run_s, self)
        try:
            comparison.run_all()
        finally:
            whole = comparison.conclude()
            overhead = {
                run.arm: figures.overhead(run, comparison.costs[run.arm])
                for run in comparison.runs
                if run.arm in comparison.costs
            }
            for text in figures.overhead_lines(overhead):
                self.say(text)
            if name == "overhead":
                steps = figures.steps(comparison.runs)
                for text in figures.step_lines(steps):
                    self.say(text)
                self.results[name]["steps"] = steps
            self.results[name] |= {"whole": whole, "overhead": overhead, "results": out.name}
        if not whole:
            raise PartError(f"{comparison.failures or 'token counts differ'}")
        return {}

    def moves(self, plan: Plan) -> dict[str, Any]:
        server = self.server(moves.moving(plan), plan, self.model(plan))
        processor = self.processor(plan)
        rows: list[dict[str, Any]] = []
        self.results["moves"]["rows"] = rows
        self.say(figures.moves_head())
        for tokens in self.of.prompts:
            if self.left < self.of.run_s:
                raise ArmError(f"{tokens} tokens not run: {max(0.0, self.left):.0f} s left")
            bounded = min(plan.run_timeout_s, self.left)
            target = dataclasses.replace(target_of(plan, server, processor), run_timeout_s=bounded)
            row = moves.measure(target, moves.items_of(plan, tokens, self.of.moved))
            rows.append(dataclasses.asdict(row))
            self.say(figures.moves_line(row))
            self.save()
        if not all(row["moves"] for row in rows):
            raise PartError("nobody moved")
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evals/gpu/check.sh", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=folder, default=str(CACHE / "check"), help="of the results")
    parser.add_argument(
        "--seconds", type=positive, default=SECONDS, help="begin nothing after these (%(default)s)"
    )
    parser.add_argument("--from-kit", action="store_true", help="SGLang is that of `kit.sh`")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=("probe", "identity", "prefixes", "order", "overhead", "moves"),
        help="this part; may be given several times",
    )
    asked = parser.parse_args(argv)
    # Leaving by an exception takes the running servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    kind = device.kind() if asked.device == "auto" else asked.device
    env = kit.contents().environment if asked.from_kit else {}
    if kind == "cuda":
        kernels.find_headers()  # Of servers, too.
    check = Check(kind, asked.out, asked.seconds, asked.only, env)
    try:
        return 0 if check.run() else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
