"""Releases streamed answering tokens at the reader's pace (`--pascal-pace-stream`).

Runs in the process that serves HTTP, between SGLang's token stream and the client. Thinking passes
at once; an answer's tokens leave one `answer_tpot_ms` apart, those that came early from a buffer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pascal_sglang.config import PascalConfig

# Answering tokens held back per answer. Beyond it the oldest leave early: memory is bounded, and
# nobody reads this far behind.
BUFFER_TOKENS = 1024

Chunk = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One answer's chunks not yet released, each with its due time (s) and number of tokens."""

    tpot: float
    held: deque[tuple[float, int, Chunk]] = field(default_factory=deque)
    held_tokens: int = 0
    seen: int = 0
    _last_due: float = -math.inf
    _next_due: float = -math.inf

    def add(self, now: float, chunk: Chunk, answer_tokens: int) -> None:
        """Take in a chunk that brings the answer to `answer_tokens` tokens. It is due when its
        first token is, and at once behind the chunk before it if it brings none."""
        new = max(0, answer_tokens - self.seen)
        if new:
            self._last_due = max(now, self._next_due)
            self._next_due = self._last_due + new * self.tpot
            self.seen = answer_tokens
        else:
            self._last_due = max(now, self._last_due)
        self.held.append((self._last_due, new, chunk))
        self.held_tokens += new

    @property
    def due(self) -> float:
        """When the first of `held` is due, in seconds; minus infinity while too much is held."""
        return -math.inf if self.held_tokens > BUFFER_TOKENS else self.held[0][0]

    def release(self) -> Chunk:
        _, tokens, chunk = self.held.popleft()
        self.held_tokens -= tokens
        return chunk


class Pacing:
    """The answers of one request: several with `n` above 1 or a batch. `tpot_of`: seconds per token
    for the answer of an index; None stands for the only one."""

    def __init__(self, tpot_of: Callable[[Hashable], float]) -> None:
        self._tpot_of = tpot_of
        self._answers: dict[Hashable, Answer] = {}

    def add(self, now: float, chunk: Chunk) -> None:
        index = chunk.get("index")
        if index not in self._answers:
            self._answers[index] = Answer(self._tpot_of(index))
        self._answers[index].add(now, chunk, answer_tokens(chunk))

    def due(self) -> float:
        """When the next chunk leaves; infinity while nothing is held."""
        return min((a.due for a in self._answers.values() if a.held), default=math.inf)

    def release(self, now: float) -> Iterator[Chunk]:
        """Chunks that are due, each answer's in its order."""
        while self.due() <= now:
            first = min((a for a in self._answers.values() if a.held), key=lambda a: a.due)
            yield first.release()


def answer_tokens(chunk: Chunk) -> int:
    """Answering tokens up to this chunk: all tokens so far less the thinking ones."""
    meta = chunk.get("meta_info") or {}
    return int(meta.get("completion_tokens") or 0) - int(meta.get("reasoning_tokens") or 0)


async def paced(
    inner: AsyncGenerator[Chunk, None],
    pacing: Pacing,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Chunk, None]:
    """`inner`'s chunks, each when `pacing` has it due; its error comes after what came before it.

    `inner` is read as fast as it gives. Closing this generator cancels `inner` where it waits.
    """
    news = asyncio.Event()

    async def read() -> None:
        try:
            async for chunk in inner:
                pacing.add(clock(), chunk)
                news.set()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            news.clear()
            for chunk in pacing.release(clock()):
                yield chunk
            due = pacing.due()
            if math.isinf(due) and due > 0 and reader.done():
                break
            if not news.is_set():
                wait_s = None if math.isinf(due) else max(0.0, due - clock())
                try:
                    await asyncio.wait_for(news.wait(), wait_s)
                except TimeoutError:
                    continue
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await inner.aclose()


def generate_request(
    original: Callable[..., AsyncGenerator[Chunk, None]], manager: Any, obj: Any, *args: Any
) -> AsyncGenerator[Chunk, None]:
    """Around `TokenizerManager.generate_request`: streams are paced, everything else is left be."""
    stream = original(manager, obj, *args)
    config = PascalConfig.from_env()
    if config is None or not config.pace_stream or not getattr(obj, "stream", False):
        return stream

    def tpot_of(index: Hashable) -> float:
        params = obj.sampling_params
        if isinstance(params, list) and isinstance(index, int):
            params = params[index] if index < len(params) else None
        custom = params.get("custom_params") if isinstance(params, dict) else None
        return config.answer_tpot_ms_of(custom) / 1000

    return paced(stream, Pacing(tpot_of))
