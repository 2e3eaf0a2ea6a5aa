"""A replay that somebody watches: a progress bar, and Ctrl-C keeps what has come back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from evals.load.client import Target, open_loop
from evals.load.items import Item
from evals.load.record import Record

REFRESH_S = 0.2
CUT = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What came back. `lag_p99_ms`: the client's own lateness, None for an interrupted run."""

    items: list[Item]
    records: list[Record]
    lag_p99_ms: float | None
    unsent: int = 0

    @property
    def interrupted(self) -> bool:
        return self.lag_p99_ms is None


def watch(items: Sequence[Item], target: Target, *, seed: int, bar: bool = True) -> Watched:
    """`client.replay` with a progress bar on standard error unless `bar` is false.

    The first Ctrl-C ends the run and drops the items that were not sent; what was under way then
    has the error `interrupted`. A second one ends the process as usual.
    """
    return asyncio.run(attend(items, target, seed, bar=bar))


@contextlib.contextmanager
def ctrl_c_cancels(task: asyncio.Task[Any]) -> Iterator[None]:
    """The first Ctrl-C cancels `task`, a second one is as usual. In an event loop of the main
    thread."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def attend(items: Sequence[Item], target: Target, seed: int, *, bar: bool) -> Watched:
    """`watch` inside a running event loop of the main thread."""
    records: list[Record] = []
    task = asyncio.create_task(open_loop(items, target, seed, records))
    with ctrl_c_cancels(task), tqdm(total=len(items), unit="req", disable=not bar) as shown:
        while not task.done():
            await asyncio.wait([task], timeout=REFRESH_S)
            shown.update(sum(r.finished or r.error is not None for r in records) - shown.n)
    if not task.cancelled():
        back = task.result()
        return Watched(items=list(items), records=back.records, lag_p99_ms=back.lag_p99_ms)
    for record in records:
        if not record.finished and record.error is None:
            record.error = CUT
    kept = [pair for pair in zip(items, records, strict=True) if pair[1].sent_s is not None]
    return Watched(
        items=[item for item, _ in kept],
        records=[record for _, record in kept],
        lag_p99_ms=None,
        unsent=len(items) - len(kept),
    )
