"""A closed-loop client of `/v1/chat/completions`: so many requests at a time, to any server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import orjson
from tqdm import tqdm

from evals.grading.reply import Heard
from evals.load import auth
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

    def request(self, prompt: str) -> dict[str, Any]:
        """The arguments of the client's call."""
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": self.extra,
        }
        return request if self.max_tokens is None else {**request, "max_tokens": self.max_tokens}


def first_model(base_url: str) -> str | None:
    """The first model an endpoint lists, None where it lists none. Raises EndpointError where
    no server answers."""
    try:
        with openai.OpenAI(timeout=LOOKUP_TIMEOUT_S, **_to(base_url)) as client:
            return str(client.models.list().data[0].id)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise EndpointError(f"{base_url} refuses us: HTTP {error.status_code}") from error
    except openai.APIConnectionError as error:
        raise EndpointError(f"no server answers at {base_url} ({error.__cause__})") from error
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _to(base_url: str) -> dict[str, Any]:
    """The client's arguments for a server, with a key if there is one; nothing is sent twice."""
    return {"base_url": f"{base_url}/v1", "api_key": auth.key() or "", "max_retries": 0}


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
    # No request queues behind a stream, and each has a time-out of its own.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        openai.DefaultAsyncHttpxClient(limits=limits, timeout=None, trust_env=False) as connections,
        asyncio.TaskGroup() as group,
    ):
        client = openai.AsyncOpenAI(http_client=connections, timeout=None, **_to(endpoint.base_url))

        async def work() -> None:
            for place in places:
                await _ask(client, endpoint, prompts[place], heard[place], start)
                bar.update()

        for _ in range(min(endpoint.concurrency, len(prompts))):
            group.create_task(work())


async def _ask(
    client: openai.AsyncOpenAI, endpoint: Endpoint, prompt: str, heard: Heard, start: float
) -> None:
    record, completions = heard.record, client.chat.completions
    record.arrival_s = record.sent_s = time.perf_counter() - start
    try:
        async with (
            asyncio.timeout(endpoint.request_timeout_s),
            # As lines: the client's own events would cost more than twice the time of each.
            completions.with_streaming_response.create(**endpoint.request(prompt)) as reply,
        ):
            async for line in reply.iter_lines():
                payload = line.removeprefix("data:").strip()
                if line.startswith("data:") and payload != "[DONE]":
                    heard.note(orjson.loads(payload), time.perf_counter() - start)
    except TimeoutError:
        record.error = TIMEOUT
    except openai.APIStatusError as error:
        record.error = f"HTTP {error.status_code}: {error.response.text[:200]}"
    except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"[:200]
    except asyncio.CancelledError:
        record.error = CUT
        raise
    finally:
        heard.close()
