"""A closed-loop client of `/v1/chat/completions`: so many requests at a time, to any server."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from tqdm import tqdm

from evals.grading.reply import Heard
from evals.load import auth, sse
from evals.load.attended import CUT, ctrl_c_cancels

TIMEOUT = "timeout (request)"
LOOKUP_TIMEOUT_S = 30.0


class EndpointError(RuntimeError):
    """An endpoint that cannot be asked; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask, and how. base_url: without `/v1`. max_tokens: thinking included; None leaves
    it to the server. concurrency: requests at one time. request_timeout_s: of each. extra: more
    fields of a request."""

    base_url: str
    model: str
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 8
    request_timeout_s: float = 3600.0
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return orjson.dumps({**body, **self.extra})


def first_model(base_url: str) -> str | None:
    """The first model an endpoint lists, None where it lists none. Raises EndpointError where
    nobody answers."""
    try:
        request = urllib.request.Request(f"{base_url}/v1/models", headers=_headers())
        with urllib.request.urlopen(request, timeout=LOOKUP_TIMEOUT_S) as reply:
            body = reply.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise EndpointError(f"{base_url} refuses us: HTTP {error.code}") from error
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EndpointError(f"no server answers at {base_url} ({reason})") from error
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return None


def ask_all(endpoint: Endpoint, prompts: Sequence[str], bar: tqdm[Any]) -> list[Heard]:
    """Ask every prompt in order, and move `bar` on with each that ends. Call from the main thread:
    the first Ctrl-C ends the run and keeps what has come back, a second one is as usual."""
    heard = [Heard() for _ in prompts]
    asyncio.run(_until_ctrl_c(endpoint, prompts, heard, bar))
    return heard


async def _until_ctrl_c(
    endpoint: Endpoint, prompts: Sequence[str], heard: Sequence[Heard], bar: tqdm[Any]
) -> None:
    task = asyncio.create_task(_ask_all(endpoint, prompts, heard, bar))
    with ctrl_c_cancels(task):
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _ask_all(
    endpoint: Endpoint, prompts: Sequence[str], heard: Sequence[Heard], bar: tqdm[Any]
) -> None:
    start = time.perf_counter()
    # Shared by the workers: each takes the next one that nobody has taken.
    places = iter(range(len(prompts)))
    # The server closes idle connections in its own time; limit 0: never queue behind a stream.
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(
            connector=connector, headers=_headers(), timeout=aiohttp.ClientTimeout(total=None)
        ) as session,
        asyncio.TaskGroup() as group,
    ):

        async def work() -> None:
            for place in places:
                await _ask(session, endpoint, prompts[place], heard[place], start)
                bar.update()

        for _ in range(min(endpoint.concurrency, len(prompts))):
            group.create_task(work())


async def _ask(
    session: aiohttp.ClientSession, endpoint: Endpoint, prompt: str, heard: Heard, start: float
) -> None:
    record, body = heard.record, endpoint.body(prompt)
    record.arrival_s = record.sent_s = time.perf_counter() - start
    try:
        async with (
            asyncio.timeout(endpoint.request_timeout_s),
            session.post(f"{endpoint.base_url}/v1/chat/completions", data=body) as reply,
        ):
            if reply.status != 200:
                record.error = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                return
            async for now, payload in sse.payloads(reply.content):
                heard.note(orjson.loads(payload), now - start)
    except TimeoutError:
        record.error = TIMEOUT
    except (aiohttp.ClientError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"[:200]
    except asyncio.CancelledError:
        record.error = CUT
        raise
    finally:
        heard.close()


def _headers() -> dict[str, str]:
    return {"Content-Type": "application/json", **auth.headers()}
