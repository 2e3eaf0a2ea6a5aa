"""Asks a data set of any OpenAI-compatible servers, grades the answers, and compares the servers.

`python -m evals.accuracy --dataset gsm8k --limit 200 --concurrency 32 --base-url
stock=http://127.0.0.1:30000 --base-url pascal=http://127.0.0.1:30001 --require-parity`. The servers
are asked one after another, and nothing is graded until all have been, so that grading disturbs no
measurement. Exit codes: 0, 1 when a server answered nothing or a required parity does not hold, 2
for bad input or no server, 130 after Ctrl-C, which still reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from evals.grading import parity, sandbox, scores, tasks
from evals.grading.chat import Endpoint, EndpointError, ask_all, first_model
from evals.grading.grades import Grade, Task
from evals.grading.reply import Heard
from evals.grading.scores import INTERRUPTED, Graded
from evals.load import auth, remote
from evals.load.lines import WorkloadError
from evals.options import base_url, count, positive
from evals.provenance import provenance

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

Arms = Mapping[str, Sequence[Graded]]


class OptionsError(ValueError):
    """Options that make no sense together; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = parse(arguments)
    out = asked.out or Path(f"accuracy_{time.strftime('%m%d_%H%M%S')}_{asked.dataset}.json")
    try:
        arms = _arms(asked, out)
        # Before a data set is fetched from the hub.
        endpoints = {name: _endpoint(asked, url) for name, url in arms.items()}
        questions = tasks.load(asked.dataset, asked.path, asked.limit)
        grader = _grader(asked.dataset)
    except (OptionsError, WorkloadError, sandbox.SandboxError, EndpointError) as error:
        print(f"evals: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    heard = ask(questions, endpoints, bar=not asked.disable_tqdm)
    graded = {
        name: grade(questions, answers, name, bar=not asked.disable_tqdm)
        for name, answers in heard.items()
    }
    pairs = parity.compare(graded) if asked.temperature == 0 else []
    figures = {n: scores.figures(i, asked.target_tpot_ms / 1e3) for n, i in graded.items()}
    for text in _console(asked, figures, pairs, grader):
        print(text)
    result = _result(asked, endpoints, figures, graded, pairs)
    result |= {"grader": grader, "provenance": provenance("evals.accuracy", arguments)}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    lost = asked.require_parity and not all(pair.holds for pair in pairs)
    silent = any(arm["error"] + arm["timeout"] == arm["questions"] for arm in figures.values())
    return EXIT_FAILED if lost or silent else 0


def ask(
    questions: Sequence[Task], endpoints: Mapping[str, Endpoint], *, bar: bool
) -> dict[str, list[Heard]]:
    """What each server said; after Ctrl-C the servers that remain are not asked."""
    prompts = [question.prompt for question in questions]
    heard: dict[str, list[Heard]] = {}
    stopped = False
    for name, endpoint in endpoints.items():
        if stopped:
            heard[name] = [Heard() for _ in prompts]
            continue
        with tqdm(total=len(prompts), desc=name, unit="req", disable=not bar) as shown:
            heard[name] = ask_all(endpoint, prompts, shown)
        stopped = any(each.cut for each in heard[name])
    return heard


def grade(
    questions: Sequence[Task], heard: Sequence[Heard], name: str, *, bar: bool
) -> list[Graded]:
    """Grade what was answered. Ctrl-C leaves the rest without a grade."""
    grades: dict[int, Grade] = {}
    places = [place for place, each in enumerate(heard) if scores.answered(each)]
    threads = (os.cpu_count() or 1) if questions[0].any_thread else 0
    with tqdm(total=len(places), desc=f"grading {name}", disable=not bar) as shown:
        try:
            if threads:
                with ThreadPoolExecutor(threads) as pool:
                    _grade_in_threads(pool, questions, heard, places, grades, shown)
            else:
                for place in places:
                    grades[place] = questions[place].grade(heard[place].answer)
                    shown.update()
        except (KeyboardInterrupt, sandbox.SandboxError) as stop:
            print(f"grading of {name} stopped: {str(stop) or INTERRUPTED}", file=sys.stderr)
    pairs = zip(questions, heard, strict=True)
    return [Graded(*pair, grades.get(place)) for place, pair in enumerate(pairs)]


def _grade_in_threads(
    pool: ThreadPoolExecutor,
    questions: Sequence[Task],
    heard: Sequence[Heard],
    places: Sequence[int],
    grades: dict[int, Grade],
    shown: tqdm[Any],
) -> None:
    futures = {pool.submit(questions[p].grade, heard[p].answer): p for p in places}
    try:
        for future in as_completed(futures):
            grades[futures[future]] = future.result()
            shown.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _arms(asked: argparse.Namespace, out: Path) -> dict[str, str]:
    """Base URL by name, and a look at what no single option can see."""
    arms: dict[str, str] = {}
    for name, url in asked.base_url or [("server", "http://127.0.0.1:30000")]:
        if name in arms:
            raise OptionsError(f"two servers are called {name}: --base-url NAME=URL")
        arms[name] = url
    if asked.require_parity and (len(arms) < 2 or asked.temperature != 0):
        raise OptionsError("parity needs two servers or more, and --temperature 0")
    if not out.parent.is_dir():
        raise OptionsError(f"{out}: no such folder")
    if out.is_dir():
        raise OptionsError(f"{out}: a folder, not a file")
    if asked.path and not asked.path.is_file():
        raise OptionsError(f"{asked.path}: No such file")
    return arms


def _grader(dataset: str) -> str:
    """What grades, in words: the harness, or how programs are held."""
    if dataset in tasks.CODE:
        return f"its tests, in a sandbox: {sandbox.check()}"
    return f"sgl-eval {importlib.metadata.version('sgl-eval')}"


def _endpoint(asked: argparse.Namespace, url: str) -> Endpoint:
    model = first_model(url)
    model = asked.model or model
    if model is None:
        raise EndpointError(f"{url} lists no models: give one by --model")
    return Endpoint(
        base_url=url,
        model=model,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        seed=asked.seed,
        concurrency=asked.concurrency,
        request_timeout_s=asked.request_timeout_s,
        extra=asked.extra_body,
    )


def _console(
    asked: argparse.Namespace,
    figures: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[parity.Parity],
    grader: str,
) -> list[str]:
    lines = ["", *scores.table(f"Accuracy on {asked.dataset}", figures), f"graded by {grader}"]
    lines += [str(pair) for pair in pairs]
    if len(figures) > 1 and asked.temperature != 0:
        lines.append("parity: not checked, answers are sampled (--temperature 0)")
    for name, arm in figures.items():
        lines += [f"{name}: error: {error}" for error in arm.get("errors", ())]
    return lines


def _result(
    asked: argparse.Namespace,
    endpoints: Mapping[str, Endpoint],
    figures: Mapping[str, Mapping[str, Any]],
    graded: Arms,
    pairs: Sequence[parity.Parity],
) -> dict[str, Any]:
    target_tpot_s = asked.target_tpot_ms / 1e3
    return {
        "dataset": asked.dataset,
        "path": str(asked.path) if asked.path else None,
        "limit": asked.limit,
        "target_tpot_ms": asked.target_tpot_ms,
        "interrupted": any(i.outcome == INTERRUPTED for items in graded.values() for i in items),
        "parity": [{"holds": pair.holds, **dataclasses.asdict(pair)} for pair in pairs],
        "arms": {
            name: {
                "endpoint": dataclasses.asdict(endpoint),
                "server_info": remote.server_info(endpoint.base_url),
                **figures[name],
                "items": [scores.entry(item, target_tpot_s) for item in graded[name]],
            }
            for name, endpoint in endpoints.items()
        },
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evals.accuracy",
        description="Accuracy on a data set, beside TTFO and QoE, of one server or several.",
    )
    add = parser.add_argument
    add(
        "--base-url",
        action="append",
        type=_server,
        metavar="[NAME=]URL",
        help="a server; again for every further one (default http://127.0.0.1:30000)",
    )
    auth.add_option(parser)
    add("--dataset", choices=sorted(tasks.MAKERS), required=True)
    add("--path", type=Path, help="JSONL file of the data set; by default it comes from the hub")
    add("--limit", type=count, help="only the first so many questions")
    add("--concurrency", type=count, default=8, help="requests at one time")
    add("--max-tokens", type=count, help="per request, thinking included")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="goes along with every request")
    add("--model", help="by default the first one that a server lists")
    add(
        "--extra-body",
        type=_fields,
        default={},
        metavar="JSON",
        help="more fields of every request, such as chat_template_kwargs",
    )
    add("--target-tpot-ms", type=positive, default=100.0, help="the reader's pace, for QoE")
    add("--request-timeout-s", type=positive, default=3600.0)
    add("--require-parity", action="store_true", help="exit 1 unless all servers answer alike")
    add("--out", type=Path, help="JSON result (default accuracy_DATE_TIME_DATASET.json)")
    add("--disable-tqdm", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def _server(text: str) -> tuple[str, str]:
    """Name and base URL."""
    name, equals, url = text.partition("=")
    if not equals or "://" in name:
        name, url = "", text
    url = base_url(url)
    return name or urlsplit(url).netloc, url


def _fields(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text[:40]!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
