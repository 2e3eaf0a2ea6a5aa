"""When a running request got no step, as the server tells: `paused` and `moved`.

Only our servers tell, for every instance at `/pascal/status`.
"""

from __future__ import annotations

from typing import NamedTuple

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(total=10)


class Break(NamedTuple):
    """kind: `paused` or `moved`. start_s, end_s: seconds after the request came to the server."""

    kind: str
    start_s: float
    end_s: float


async def told(session: aiohttp.ClientSession, rid: str) -> list[Break] | None:
    """The breaks of a request that has just ended; None where the server does not say."""
    try:
        async with session.get("/pascal/status", timeout=TIMEOUT) as reply:
            if reply.status != 200:
                return None
            status = await reply.json()
        ended = [r for instance in status["instances"] for r in instance.get("recent", ())]
        found = next((r["breaks"] for r in ended if r["rid"] == rid), None)
        return None if found is None else [Break(*each) for each in found]
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
        return None
