"""Two instances of the tiny model on two cores, as `evals.bench.blocking` and
`evals.bench.controllers` start them."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from evals import arms
from evals.arms import TINY, Arm, Plan, Rate
from evals.compare import CACHE, EXIT_BAD_INPUT
from evals.load.server import ArmError
from evals.options import folder

FLAGS = (
    *("--model-path", "{model}", "--device", "cpu", "--dtype", "float32", "--dp-size", "2"),
    *("--reasoning-parser", "qwen3", "--enable-custom-logit-processor", "--random-seed", "1"),
    *("--incremental-streaming-output", "--log-level", "warning"),
    *("--max-total-tokens", "{kv_tokens}"),
)
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def plan(pair: tuple[Arm, ...], requests: int, flags: tuple[str, ...]) -> Plan:
    """A plan of these arms with memory to spare; what is sent, and when, is the caller's."""
    return Plan(
        preset="",
        requests=requests,
        seeds=1,
        kv_tokens=131072,
        target_tpot_ms=25.0,
        flags=(*FLAGS, *flags),
        arms=pair,
        rates=(Rate("one", 1.0),),
        env=ENV,
    )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A server or model that cannot be had ends this process with one line and exit code 2."""
    try:
        yield
    except (ArmError, OSError) as error:
        print(f"evals: error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Path, str]:
    """The options, with the tiny model's folder and its logit processor."""
    where = "folder that the tiny model is built in"
    parser.add_argument("--model", type=folder, default=str(CACHE), help=where)
    options = parser.parse_args()
    # Leaving by an exception takes the running server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    model = arms.model_folder(TINY, options.model)
    return options, model, arms.logit_processor(TINY)
