"""A long mixed load, and afterwards nothing may be wrong or left behind: `python -m evals.soak`.

Starts the tiny model on one instance and then on two, of which one is killed halfway, with pauses
and moves at random on top of those for want of memory. Sends requests of every kind
(`bodies.KINDS`); readers hang up, requests are aborted or sent twice, weights are updated, the
server is paused, flushed and asked about itself. With `--base-url` a running server gets the load
alone, without what would disturb its users.

At the end: every request has ended once and for a true reason; no stream took back a token; the
same body brought the same text; KV, host memory, shared memory, descriptors, threads and memory of
every process are back to what they were when warm; the log speaks of no error. Exit codes: 0, 1
when something of that does not hold, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from evals import arms
from evals.arms import TINY, Arm, Plan, Rate, serve
from evals.compare import CACHE
from evals.load import auth, remote
from evals.load.server import ArmError, Server
from evals.options import base_url, count, positive
from evals.soak import checks
from evals.soak.bodies import KINDS, catalogue
from evals.soak.operations import OPERATIONS
from evals.soak.run import Soak, Task, soak

EXIT_WRONG, EXIT_BAD_INPUT = 1, 2
START_S = 600.0
FLAGS = (
    *("--model-path", "{model}", "--device", "cpu", "--dtype", "float32"),
    *("--reasoning-parser", "qwen3", "--enable-custom-logit-processor", "--enable-metrics"),
    *("--max-total-tokens", "{kv_tokens}", "--max-running-requests", "24"),
    *("--chunked-prefill-size", "256", "--random-seed", "1", "--log-level", "warning"),
)
ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
# Besides pauses for want of memory, some by chance, so that every tier is met.
FORCED = {"policy": "pascal", "quantum_tokens": 50, "chaos": 0.004, "force_migration": 0.02}
HARMLESS = ("look", "junk")
AFTER_DEATH = ("look", "junk", "abort all", "update")
# Where the log has to speak of errors: requests that are refused, and the instance that is killed.
REFUSED = (
    r"\[http_server\] Error: ",
    r"create_error_response",
    r"Cache not flushed because there are pending requests",
)
KILLED = (r"pascal_sglang: a scheduler of instance \d+ ended with -9", r"has died")


def main(argv: Sequence[str] | None = None) -> int:
    # Leaving by an exception takes the running server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asked = parse(argv)
    kinds = asked.kinds or list(KINDS)
    bodies = catalogue(asked.seed, asked.each, arms.logit_processor(TINY), kinds)
    results: dict[str, Soak] = {}
    try:
        if asked.base_url:
            if not remote.wait_ready(asked.base_url, 5.0):
                raise ArmError(f"no server answers at {asked.base_url}/health")
            operations = [name for name in asked.operations if name in HARMLESS]
            results[asked.base_url] = soak(
                Task(
                    base_url=asked.base_url,
                    seconds=asked.seconds,
                    concurrency=asked.concurrency,
                    seed=asked.seed,
                    bodies=bodies,
                    operations=operations,
                )
            )
            print("\n".join(table(asked.base_url, results[asked.base_url])))
        else:
            for size in asked.dp_size:
                name = f"{asked.arm}, dp {size}"
                results[name] = served(asked, size, bodies)
                print("\n".join(table(name, results[name])), flush=True)
    except (ArmError, OSError) as error:
        print(f"evals.soak: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if asked.json:
        asked.json.write_text(json.dumps(report(asked, results), indent=1) + "\n")
    return EXIT_WRONG if any(r.findings.counts for r in results.values()) else 0


def served(asked: argparse.Namespace, size: int, bodies: list[Any]) -> Soak:
    """The soak of a server of our own, which ends with it."""
    model = arms.model_folder(TINY, asked.model or CACHE)
    kill = 1 if asked.kill and size > 1 else None
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        plan = plan_of(asked, size, folder)
        with serve(plan.arms[0], plan, model) as server:
            ready, root = len(_log_of(server)), server.pid
            task = Task(
                base_url=server.base_url,
                seconds=asked.seconds / len(asked.dp_size),
                concurrency=asked.concurrency,
                seed=asked.seed,
                bodies=bodies,
                operations=asked.operations,
                after_death=[name for name in AFTER_DEATH if name in asked.operations],
                kill=kill,
                root=root,
                model=str(model),
            )
            result = soak(task)
            held = checks.held(root).values()
            shared = {each.partition(" ")[2] for process in held for each in process.shared}
            if server.process.poll() is not None:
                result.findings.add("the server", "ended by itself")
            # What it says while it starts and while it is stopped is not judged.
            lines = _log_of(server)[ready:]
        for name in sorted(shared):
            if name.startswith("/dev/shm/") and os.path.exists(name):
                result.findings.add("left behind", name)
        for left in sorted(Path(folder).glob("pascal-*")):
            result.findings.add("left behind", left.name)
        explained = (*REFUSED, *(KILLED if kill is not None else ()))
        for line in checks.trouble(lines, explained):
            result.findings.add("the log", line[:300])
        result.figures["log"] = str(server.log)
    return result


def _log_of(server: Server) -> list[str]:
    return server.log.read_text(errors="replace").splitlines()


def plan_of(asked: argparse.Namespace, size: int, folder: str) -> Plan:
    """How the server is started; what it writes to temporary files is in `folder`."""
    forced = FORCED | {
        "chaos": asked.chaos,
        "force_migration": asked.force_migration if size > 1 else 0.0,
    }
    pascal = {"PASCAL_SGLANG_CONFIG": json.dumps(forced)} if asked.arm == "pascal" else {}
    arm = Arm(
        name=f"soak-{asked.arm}",
        # SGLang's own command, whose configuration has what is for tests alone.
        command="stock",
        role="candidate",
        flags=("--dp-size", str(size), *asked.server_flags.split()),
        env=pascal | arms.STOCK_ON_CPU | {"TMPDIR": folder},
    )
    return Plan(
        preset="",
        requests=1,
        seeds=1,
        kv_tokens=asked.kv_tokens,
        target_tpot_ms=100.0,
        flags=FLAGS,
        arms=(arm,),
        rates=(Rate("one", 1.0),),
        env=ENV,
        start_timeout_s=START_S,
    )


def table(name: str, result: Soak) -> list[str]:
    """For people."""
    figures = result.figures
    columns = ("sent", "whole", "cut", "refused", "failed", "different")
    kinds = [[kind, *(t[key] for key in columns)] for kind, t in figures["requests"].items()]
    heads = ("kind", *columns[:-1], "differ")
    lines = ["", name, *tabulate(kinds, heads, tablefmt="plain").splitlines()]
    lines.append(f"tokens {figures['tokens']}; " + _named(figures["fates"]))
    if "pauses" in figures:
        lines.append("pauses and moves: " + _named(figures["pauses"]))
    for operation, told in figures["operations"].items():
        lines.append(f"{operation:<28}{told['times']:>7} times, slowest {told['slowest_s']} s")
    for process, told in figures["processes"].items():
        lines.append(
            f"{process:<28} files {_span(told['files'])}, threads {_span(told['threads'])}, "
            f"MiB {_span(told['mib'])}, shared {_span(told['shared'])}"
        )
    wrong = result.findings.lines()
    return [*lines, *(wrong or ["nothing wrong, nothing left"])]


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _span(values: list[int]) -> str:
    return " -> ".join(map(str, values))


def report(asked: argparse.Namespace, results: dict[str, Soak]) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "seconds": asked.seconds,
        "concurrency": asked.concurrency,
        "seed": asked.seed,
        "soaks": {
            name: {**r.figures, "wrong": r.findings.counts, "examples": r.findings.examples}
            for name, r in results.items()
        },
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evals.soak", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--seconds", type=positive, default=600.0, help="of load, shared by the servers")
    add("--base-url", type=base_url, help="a running server of the tiny model: nothing is started")
    auth.add_option(parser)
    add("--dp-size", type=count, nargs="+", default=[1, 2], help="one server each (1 2)")
    add("--kill", action=argparse.BooleanOptionalAction, default=True, help="where there are two")
    add("--arm", choices=("pascal", "stock"), default="pascal", help="who schedules")
    add("--concurrency", type=count, default=32)
    add("--each", type=count, default=3, help="bodies of every kind (%(default)s)")
    add("--kinds", nargs="+", choices=list(KINDS), metavar="KIND", help="of body; default: all")
    add(
        "--operations",
        nargs="*",
        choices=list(OPERATIONS),
        default=list(OPERATIONS),
        metavar="NAME",
        help=f"of {', '.join(OPERATIONS)}; default: all",
    )
    add("--kv-tokens", type=count, default=3000, help="per instance; less than the load wants")
    add("--chaos", type=float, default=FORCED["chaos"], help="chance of a pause, per pass")
    add(
        "--force-migration",
        type=float,
        default=FORCED["force_migration"],
        help="chance of a move, per pass",
    )
    add("--server-flags", default="", help="more of the server's, in one string")
    add("--model", type=Path, help="folder that the tiny model is built in")
    add("--seed", type=int, default=1)
    add("--json", type=Path, help="file for the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
