"""Sends the same burst of requests to each server in turn and draws what each request does.

`python -m evals.burst fcfs=http://127.0.0.1:30001 pascal=http://127.0.0.1:30000`. On a terminal the
picture grows while the requests run. It shows what the client sees: a request that has begun and
gets no token in the time of a letter is paused, whatever the reason. Exit codes: 0, 1 when a
request failed, 2 for bad input or no server, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from evals.load import processor, remote
from evals.load.client import Target, open_loop, replay
from evals.load.items import Item
from evals.load.record import Record
from evals.options import base_url, count, positive
from evals.reporting.metrics import QOE_OBJECTIVE, Request, measure

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
CELL_S = 0.5
NUMBER_COLUMNS = 4
REFRESH_S = 0.25
SPREAD_S = 2.0
PROMPT_TOKENS = 16
THINKING_TOKENS = (6, 26)
ANSWER_TOKENS = (24, 40)
ALONE = Item(arrival_s=0.0, prompt_tokens=PROMPT_TOKENS, thinking_tokens=4, answer_tokens=8)
# The reader takes a token in the time in which the server, alone with it, decodes this many.
READER_SLOWER = 4.0
# By what the client saw of a request in a cell: letter and colour.
LOOK = {
    "queued": (".", "dim"),
    "thinking": ("t", "bold yellow"),
    "paused": ("-", "red"),
    "answering": ("A", "bold green"),
}


class BurstError(RuntimeError):
    """A burst that cannot be sent; the message is one line."""


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    url: str


def burst(requests: int, seed: int) -> list[Item]:
    """Requests that come within `SPREAD_S` seconds, with lengths in tokens drawn by `seed`."""
    draw = random.Random(seed)
    return [
        Item(
            arrival_s=SPREAD_S * place / requests,
            prompt_tokens=PROMPT_TOKENS,
            thinking_tokens=draw.randint(*THINKING_TOKENS),
            answer_tokens=draw.randint(*ANSWER_TOKENS),
        )
        for place in range(requests)
    ]


def cells(record: Record, until_s: float, cell_s: float = CELL_S) -> Iterator[str]:
    """What a request was seen to do in each `cell_s` seconds of the run, up to `until_s`; an empty
    text before it was sent and after its last token."""
    sent = record.sent_s
    ended = record.error is not None or record.finished
    last_s = record.token_s[-1] if record.token_s else 0.0
    place = 0
    for cell in itertools.count():
        start_s, end_s = cell * cell_s, (cell + 1) * cell_s
        if start_s >= until_s:
            return
        before = place
        while place < len(record.token_s) and record.token_s[place] < end_s:
            place += 1
        if place > before:
            yield "thinking" if place <= record.reasoning_tokens else "answering"
        elif sent is None or end_s <= sent or (ended and start_s > last_s):
            yield ""
        else:
            yield "paused" if place else "queued"


def cell_length(until_s: float, columns: int) -> float:
    """Seconds of a letter with which a run fits into a line."""
    cell_s = CELL_S
    while until_s / cell_s > columns - NUMBER_COLUMNS:
        cell_s *= 2
    return cell_s


def row(number: int, record: Record, until_s: float, cell_s: float = CELL_S) -> Text:
    line = Text(f"{number:3d} ", no_wrap=True)
    for kind in cells(record, until_s, cell_s):
        line.append(*LOOK.get(kind, (" ", "")))
    if record.error is not None:
        line.append(f" {record.error}", "red")
    return line


def picture(arm: Arm, records: Sequence[Record], until_s: float, columns: int) -> Group:
    """A line a request."""
    cell_s = cell_length(until_s, columns)
    title = Text(arm.name, "bold").append(f"  (a letter is {cell_s:g} s)", "dim")
    return Group(title, *(row(n, record, until_s, cell_s) for n, record in enumerate(records, 1)))


def legend(tpot_s: float) -> Text:
    line = Text()
    for kind, (letter, style) in LOOK.items():
        line.append(letter, style).append(f" {kind}  ")
    return line.append(f"a reader takes {1 / tpot_s:.1f} tokens a second", "dim")


async def send(items: Sequence[Item], arm: Arm, target: Target, console: Console) -> list[Record]:
    """The records of one burst, drawn as they grow."""
    records: list[Record] = []
    loop = asyncio.get_running_loop()
    start = loop.time()
    sending = asyncio.create_task(open_loop(items, target, 0, records))
    with Live(console=console, auto_refresh=False) as live:
        while not sending.done():
            await asyncio.wait({sending}, timeout=REFRESH_S)
            shown = picture(arm, records, loop.time() - start, console.width)
            live.update(shown, refresh=console.is_terminal)
        last_s = max((record.token_s[-1] for record in records if record.token_s), default=0.0)
        live.update(picture(arm, records, last_s, console.width), refresh=True)
    console.print()
    await sending
    return records


def summary(arm: Arm, figures: Sequence[Request]) -> str:
    ttfo = [figure.ttfo_s for figure in figures if figure.ttfo_s is not None]
    on_pace = sum(not figure.violates for figure in figures)
    mean = f"{statistics.fmean(ttfo):5.2f} s" if ttfo else "none"
    return (
        f"{arm.name:>8}: mean TTFO {mean}, "
        f"{on_pace} of {len(figures)} answers at the reader's pace (QoE {QOE_OBJECTIVE})"
    )


def step_s(target: Target) -> float:
    """Seconds a token takes the server alone, prefill included. Raises: BurstError where it does
    not answer."""
    (record,) = replay([ALONE], target).records
    if record.error is not None:
        raise BurstError(f"{target.base_url}: {record.error}")
    if record.sent_s is None or not record.token_s:
        raise BurstError(f"{target.base_url}: no token came")
    return (record.token_s[-1] - record.sent_s) / len(record.token_s)


def run(asked: argparse.Namespace, console: Console) -> int:
    for arm in asked.arms:
        if not remote.wait_ready(arm.url, asked.ready_check_timeout_sec):
            raise BurstError(f"no server answers at {arm.url}/health")
    first = Target(
        base_url=asked.arms[0].url, logit_processor=processor.resolve(asked.logit_processor)
    )
    tpot_s = asked.tpot_ms / 1e3 if asked.tpot_ms else READER_SLOWER * step_s(first)
    items = burst(asked.requests, asked.seed)
    console.print(legend(tpot_s))
    lines, failed = [], False
    for arm in asked.arms:
        target = replace(first, base_url=arm.url, answer_tpot_ms=round(tpot_s * 1e3))
        records = asyncio.run(send(items, arm, target, console))
        figures = [measure(r, item, None, tpot_s) for r, item in zip(records, items, strict=True)]
        failed |= any(not figure.ok for figure in figures)
        lines.append(summary(arm, figures))
    for line in lines:
        console.print(line, highlight=False)
    return EXIT_FAILED if failed else 0


def arm(text: str) -> Arm:
    """`NAME=URL`, or a URL alone."""
    name, equals, url = text.partition("=")
    if not equals or "/" in name:
        name, url = text, text
    return Arm(name, base_url(url))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evals.burst", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("arms", nargs="+", type=arm, metavar="[NAME=]URL")
    parser.add_argument("--requests", type=count, default=12)
    parser.add_argument("--seed", type=int, default=0, help="draws the lengths")
    parser.add_argument(
        "--tpot-ms",
        type=positive,
        help=f"the reader's pace (default: {READER_SLOWER:.0f} decode steps of the first server)",
    )
    parser.add_argument(
        "--logit-processor",
        default=processor.NATURAL,
        help="what ends the thinking, as for evals.serving (default: the server's own, which "
        "takes the budget of a request)",
    )
    parser.add_argument("--ready-check-timeout-sec", type=count, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        return run(asked, Console())
    except (BurstError, processor.ProcessorError) as error:
        print(f"evals.burst: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
