"""Server-sent events of a reply as they come."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import aiohttp

FIELD = b"data:"
DONE = b"[DONE]"


async def payloads(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """What each event says and when it came (`time.perf_counter()`), without the closing `[DONE]`.
    Events that come in one piece have one time; a piece may end anywhere in an event."""
    pending = b""
    async for piece in content.iter_any():
        now = time.perf_counter()
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            payload = line.removeprefix(FIELD).strip()
            if line.startswith(FIELD) and payload != DONE:
                yield now, payload
