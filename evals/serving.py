"""Replays a workload against a running SGLang server and reports what its readers feel.

`python -m evals.serving --base-url http://127.0.0.1:30000 --dataset-name servegen-r1 --num-prompts
200 --request-rate 4 --goodput ttfo:5000 answer_tpot:50`. The options are named as those of `python
-m sglang.benchmark.serving`, and so are the lines and keys both have. Exit codes: 0, 1 when no
request succeeded, 2 for bad input or no server, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import sources, workload
from evals.load import alone, auth, processor, remote
from evals.load.attended import Watched, watch
from evals.load.client import LAG_LIMIT_MS, Target
from evals.load.record import Idle, Record
from evals.load.timeline import details
from evals.options import base_url, count, positive
from evals.provenance import provenance
from evals.reporting import report
from evals.reporting.metrics import GOODPUT_KEYS, bin_edges, intervals, summarize
from evals.workload import Item, WorkloadError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
BACKEND = "sglang"


class ServerError(RuntimeError):
    """A server that cannot be measured; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = parse(arguments)
    out = asked.output_file or Path(
        f"evals_{time.strftime('%m%d')}_{asked.num_prompts}_{_dataset(asked)}.jsonl"
    )
    if not out.parent.is_dir():
        return _bad(f"{out}: no such folder")
    try:
        target = _target(asked)
        if not Path(asked.dataset_name).is_file():
            sources.find(asked.dataset_name)
        # Before a data set is fetched from the hub.
        if not remote.wait_ready(asked.base_url, asked.ready_check_timeout_sec):
            raise ServerError(
                f"no server answers at {asked.base_url}/health; "
                "--ready-check-timeout-sec waits for one that is starting"
            )
        items = build(asked)
        idle = prepare(asked, target)
    except (WorkloadError, processor.ProcessorError, ServerError, OSError) as error:
        return _bad(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    info, before = remote.server_info(asked.base_url), remote.counters(asked.base_url)
    back = watch(items, target, seed=asked.seed, bar=not asked.disable_tqdm)
    counters = remote.change(before, remote.counters(asked.base_url))
    if not back.records:
        return _bad("interrupted before the first request was sent")
    result = figures(asked, back, idle, counters)
    result |= {
        "server_info": info,
        "provenance": provenance("evals.serving", arguments),
    }
    for line in console(asked, result):
        print(line)
    with out.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"appended to {out}")
    if back.interrupted:
        return EXIT_INTERRUPTED
    return 0 if result["completed"] else EXIT_FAILED


def build(asked: argparse.Namespace) -> list[Item]:
    """The workload: a file that `evals.workload` wrote, or drawn from one of its sources."""
    saved = Path(asked.dataset_name)
    rate, at_once = asked.request_rate, asked.request_rate == math.inf
    if saved.is_file():
        if rate is not None and not at_once:
            raise WorkloadError(f"{saved}: a saved workload has its own arrivals: no request rate")
        items = workload.load(saved)[: asked.num_prompts]
    else:
        items = workload.build(
            workload.Recipe(
                source=asked.dataset_name,
                path=asked.dataset_path,
                requests=asked.num_prompts,
                rate=None if at_once else rate,
                seed=asked.seed,
                scale=asked.scale,
            )
        )
    return [dataclasses.replace(item, arrival_s=0.0) for item in items] if at_once else items


def _target(asked: argparse.Namespace) -> Target:
    return Target(
        base_url=asked.base_url,
        logit_processor=processor.resolve(asked.logit_processor),
        request_timeout_s=asked.request_timeout_s,
        run_timeout_s=math.inf,
        max_concurrency=asked.max_concurrency,
    )


def prepare(asked: argparse.Namespace, target: Target) -> Idle | None:
    """Warm the server up and fit TTFO alone, unless told not to. Raises ServerError."""
    error = alone.warm_up(asked.warmup_requests, target)
    if error is not None:
        raise ServerError(f"warm-up request failed: {error}")
    if asked.no_idle_fit:
        return None
    idle = alone.measure(target)
    if idle is None:
        print("TTFO alone was not measured: too few of its requests answered, or all thought alike")
    else:
        print(f"alone: TTFO = {idle}")
    return idle


def figures(
    asked: argparse.Namespace, back: Watched, idle: Idle | None, counters: dict[str, float]
) -> dict[str, Any]:
    """The line of the result file, without what the server says of itself."""
    items, records = back.items, back.records
    if asked.logit_processor == processor.NATURAL:
        items = [_as_thought(*pair) for pair in zip(items, records, strict=True)]
    edges = bin_edges([item.thinking_tokens for item in items], asked.bins)
    rate = asked.request_rate
    result: dict[str, Any] = {
        "tag": asked.tag,
        "backend": BACKEND,
        "base_url": asked.base_url,
        "dataset_name": _dataset(asked),
        "request_rate": "trace" if rate is None else "inf" if rate == math.inf else rate,
        "max_concurrency": asked.max_concurrency,
        "seed": asked.seed,
        "interrupted": back.interrupted,
        "unsent": back.unsent,
        "idle": dataclasses.asdict(idle) if idle else None,
        "target_tpot_ms": asked.target_tpot_ms,
        "bin_edges": edges,
        "counters": counters,
        "lag_p99_ms": back.lag_p99_ms,
        **summarize(
            records,
            items,
            idle=idle,
            target_tpot_s=asked.target_tpot_ms / 1e3,
            edges=edges,
            goodput_ms=dict(asked.goodput or ()),
        ),
        **details(records, items),
    }
    if asked.output_details:
        result |= {
            "input_lens": [item.prompt_tokens for item in items],
            "output_lens": [len(record.token_s) for record in records],
            "reasoning_lens": [record.reasoning_tokens for record in records],
            "ttfts": [r.token_s[0] - r.arrival_s if r.token_s else None for r in records],
            "itls": [intervals(record.token_s) for record in records],
            "errors": [record.error or "" for record in records],
        }
    return result


def _as_thought(item: Item, record: Record) -> Item:
    """With natural lengths the model says how long it thinks, and only an answer shows it."""
    if not record.answer_s:
        return item
    return dataclasses.replace(item, thinking_tokens=max(0, record.reasoning_tokens - 1))


def console(asked: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    head = [
        ("Backend:", BACKEND),
        ("Traffic request rate:", result["request_rate"]),
        ("Max request concurrency:", asked.max_concurrency or "not set"),
    ]
    lines = report.lines(
        result,
        "Serving Benchmark Result",
        result["bin_edges"],
        head=head,
        counters=result["counters"],
    )
    lag = result["lag_p99_ms"]
    if result["interrupted"]:
        lines.append(f"interrupted: {result['unsent']} requests were not sent")
    elif lag > LAG_LIMIT_MS:
        lines.append(f"CLIENT LATE: p99 lag {lag:.1f} ms: do not trust these times")
    return ["", *lines]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evals.serving",
        description="Replay a workload against a running SGLang server.",
    )
    add = parser.add_argument
    add("--base-url", type=base_url, default="http://127.0.0.1:30000")
    auth.add_option(parser)
    add("--dataset-name", default="alpacaeval", help="a workload source, or a saved workload")
    add("--dataset-path", type=Path, help="file or folder of the source")
    add("--num-prompts", type=count, default=1000)
    add(
        "--request-rate",
        type=positive,
        help="requests per second; inf sends all at once; by default the workload's own times",
    )
    add("--max-concurrency", type=count, help="the most requests at one time; others wait")
    add("--scale", type=positive, default=1.0, help="factor on output lengths")
    add("--seed", type=int, default=42)
    add("--warmup-requests", type=int, default=1, help="sent at once before anything is measured")
    add("--no-idle-fit", action="store_true", help="do not measure TTFO alone: no slowdown")
    add(
        "--logit-processor",
        default=processor.NATURAL,
        help="ends thinking where the workload says: module:Class, a file, or the serialized form; "
        "none (default): the model's own end",
    )
    add(
        "--goodput",
        nargs="+",
        type=_objective,
        metavar="KEY:VALUE",
        help=f"objectives in milliseconds; KEY is one of {', '.join(GOODPUT_KEYS)}",
    )
    add("--target-tpot-ms", type=positive, default=100.0, help="the reader's pace, for QoE")
    add("--bins", type=count, default=4, help="thinking-length bins")
    add("--request-timeout-s", type=positive, default=6 * 3600.0)
    add(
        "--ready-check-timeout-sec",
        type=float,
        default=0.0,
        help="how long to wait for a server that is still starting (%(default)g)",
    )
    add("--output-file", type=Path, help="JSONL; a line is appended")
    add("--output-details", action="store_true", help="figures of every request as well")
    add("--disable-tqdm", action="store_true", help="no progress bar")
    add("--tag", help="name of this server in results and pages")
    return parser.parse_args(arguments)


def _dataset(asked: argparse.Namespace) -> str:
    return Path(asked.dataset_name).stem


def _objective(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in GOODPUT_KEYS:
        raise argparse.ArgumentTypeError(
            f"expected KEY:VALUE with KEY in {', '.join(GOODPUT_KEYS)}, got {text!r}"
        )
    return name, positive(value)


def _bad(message: str) -> int:
    print(f"evals: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
