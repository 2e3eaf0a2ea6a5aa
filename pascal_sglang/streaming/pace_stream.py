"""Releases streamed answering tokens at the reader's pace (`--pascal-pace-stream`).

Runs in the process that serves HTTP, between SGLang's token stream and the client. Thinking passes
at once; an answer's tokens leave one `answer_tpot_ms` apart, those that came early from a buffer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Hashable
from functools import partial
from typing import Any

from pascal_sglang.clock import now
from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints import answer_eta
from pascal_sglang.entrypoints.crash import is_ending
from pascal_sglang.entrypoints.request_notes import noted, takes_notes
from pascal_sglang.streaming.followed import followed
from pascal_sglang.streaming.held_chunks import Chunk
from pascal_sglang.streaming.pacing import Pacing

# How long, in seconds, a wait may go without looking whether the server wants to stop.
LOOK_UP_S = 1.0


async def paced(
    inner: AsyncGenerator[Chunk, None],
    pacing: Pacing,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = now,
) -> AsyncGenerator[Chunk, None]:
    """`inner`'s chunks, each when `pacing` has it due, and its error behind them without waiting.

    `inner` is read as fast as it gives while the buffer takes it. Closing or cancelling this
    generator cancels `inner` where it waits. When `stopping`, nothing is held back.
    """
    news, taken = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for chunk in inner:
                pacing.add(clock(), chunk)
                news.set()
                # A client that does not take what leaves early meets SGLang's own backlog.
                while pacing.crowded:
                    taken.clear()
                    await taken.wait()
        finally:
            await inner.aclose()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # Seen, though the client may be gone.
        news.set()

    reader = asyncio.create_task(read())
    reader.add_done_callback(ended)
    try:
        while not (reader.done() and pacing.empty):
            news.clear()
            failed = reader.done() and (reader.cancelled() or reader.exception() is not None)
            for chunk in pacing.release(math.inf if failed or stopping() else clock()):
                yield chunk
            taken.set()
            if not reader.done() or not pacing.empty:
                await _wait(news, pacing.due() - clock())
        await reader
    finally:
        # No waiting here: this may be a cancelled task, or no task at all when a caller of `Engine`
        # drops the generator between two of its runs of the loop.
        reader.cancel()


async def _wait(news: asyncio.Event, seconds: float) -> None:
    """Wait for `news`, at most `seconds`."""
    try:
        async with asyncio.timeout(min(max(0.0, seconds), LOOK_UP_S)):
            await news.wait()
    except TimeoutError:
        pass


def generate_request(
    original: Callable[..., AsyncGenerator[Chunk, None]],
    manager: Any,
    obj: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[Chunk, None]:
    """Around `TokenizerManager.generate_request`: streams are paced, everything else is left be.

    Raises: ValueError, for which every route answers 400, for what this server refuses; Overloaded
    for what would take too long (`entrypoints.answer_eta`).
    """
    config = PascalConfig.from_env()
    if config is not None and (problem := config.problem_with_request(obj)):
        raise ValueError(problem)
    if config is None or config.fairness == "off":  # Otherwise once its tenant is known.
        answer_eta.decide(obj)
    start = partial(original, manager, obj, *args, **kwargs)
    # Embeddings have no stream, and no scheduling of ours.
    if config is not None and takes_notes(config) and hasattr(obj, "stream"):
        request = args[0] if args else kwargs.get("request")
        stream = noted(start, obj, request, config)
    else:
        stream = start()
    if config is None or not config.pace_stream or not getattr(obj, "stream", False):
        return followed(stream)

    def tpot_of(index: Hashable) -> float:
        return config.stream_tpot_ms_of(_sampling_params(obj, index)) / 1000

    released = paced(stream, Pacing(tpot_of), stopping=lambda: is_ending(manager))
    return followed(released)


def _sampling_params(obj: Any, index: Hashable) -> dict[str, Any]:
    """The parameters of one answer of a request; a batch has one set per prompt, and `n` answers to
    each prompt in a row."""
    params = obj.sampling_params
    if isinstance(params, list) and isinstance(index, int):
        params = params[index // obj.parallel_sample_num]
    return params if isinstance(params, dict) else {}
