"""An open-loop client of `/generate`: requests leave when they are due, whatever came back."""

from __future__ import annotations

import asyncio
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import orjson

from evals.metrics import Record
from evals.workload import Item

LAG_PROBE_S = 0.01
LAG_LIMIT_MS = 20.0
PROMPT_VOCABULARY = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to send.

    logit_processor: serialized processor that ends thinking after
        `custom_params["thinking_budget"]` tokens.
    request_timeout_s, run_timeout_s: bounds of one request and of a whole replay.
    """

    base_url: str
    logit_processor: str
    request_timeout_s: float = 300.0
    run_timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Replay:
    """What came back, in the order of the items; `lag_p99_ms` is the client's own lateness."""

    records: list[Record]
    lag_p99_ms: float


def prompt_ids(index: int, length: int, seed: int) -> list[int]:
    """Ids of prompt `index`: it opens with its own number, so no two prompts share a prefix."""
    rng = random.Random(seed * 1_000_003 + index)
    head = [index % PROMPT_VOCABULARY, index // PROMPT_VOCABULARY % PROMPT_VOCABULARY]
    return (head + [rng.randrange(PROMPT_VOCABULARY) for _ in range(length)])[: max(length, 2)]


def request_body(item: Item, index: int, seed: int, logit_processor: str) -> dict[str, Any]:
    return {
        "input_ids": prompt_ids(index, item.prompt_tokens, seed),
        "stream": True,
        "require_reasoning": True,
        "custom_logit_processor": logit_processor,
        "sampling_params": {
            "temperature": 0,
            "ignore_eos": True,
            "max_new_tokens": item.output_tokens,
            "custom_params": {"thinking_budget": item.thinking_tokens},
        },
    }


def replay(items: Sequence[Item], target: Target, *, seed: int = 0) -> Replay:
    """Send every item at its time and wait for the streams; `seed` draws the prompts."""
    back = asyncio.run(open_loop(items, target, seed))
    if back.lag_p99_ms > LAG_LIMIT_MS:
        warnings.warn(f"the client itself was late: p99 lag {back.lag_p99_ms:.1f} ms", stacklevel=2)
    return back


async def open_loop(items: Sequence[Item], target: Target, seed: int) -> Replay:
    """`replay` inside a running event loop."""
    records = [Record(arrival_s=item.arrival_s) for item in items]
    lags_s: list[float] = []
    tasks = [asyncio.create_task(_watch_lag(lags_s))]
    # The server closes idle connections in its own time; limit 0: never queue behind a stream.
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with (
            aiohttp.ClientSession(
                target.base_url, connector=connector, timeout=aiohttp.ClientTimeout(total=None)
            ) as session,
            asyncio.timeout(target.run_timeout_s),
        ):
            start = time.perf_counter()
            streams = []
            for index, (item, record) in enumerate(zip(items, records, strict=True)):
                body = orjson.dumps(request_body(item, index, seed, target.logit_processor))
                await asyncio.sleep(max(0.0, start + item.arrival_s - time.perf_counter()))
                streams.append(asyncio.create_task(_stream(session, body, record, start, target)))
                tasks.append(streams[-1])
            await asyncio.gather(*streams)
    except TimeoutError:
        # The bound of the whole run: what is still open counts as timed out.
        for record in records:
            if not record.finished and record.error is None:
                record.error = "timeout (run)"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    lag_p99_ms = float(np.percentile(lags_s, 99)) * 1e3 if lags_s else 0.0
    return Replay(records, lag_p99_ms)


async def _watch_lag(lags_s: list[float]) -> None:
    """How late this event loop wakes, in seconds; every time stamp carries that error."""
    while True:
        due = time.perf_counter() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        lags_s.append(time.perf_counter() - due)


async def _stream(
    session: aiohttp.ClientSession, body: bytes, record: Record, start: float, target: Target
) -> None:
    record.sent_s = time.perf_counter() - start
    try:
        async with (
            asyncio.timeout(target.request_timeout_s),
            session.post(
                "/generate", data=body, headers={"Content-Type": "application/json"}
            ) as reply,
        ):
            if reply.status != 200:
                record.error = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                return
            pending = b""
            async for chunk in reply.content.iter_any():
                now = time.perf_counter() - start
                *events, pending = (pending + chunk).split(b"\n\n")
                for event in events:
                    note_event(record, event, now)
    except TimeoutError:
        record.error = "timeout (request)"
    except aiohttp.ClientError as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and not record.finished:
        record.error = "stream ended early"


def note_event(record: Record, event: bytes, now_s: float) -> None:
    """Add one server-sent event; every token it brings gets the event's time."""
    payload = event.removeprefix(b"data: ").strip()
    if not payload or payload == b"[DONE]":
        return
    reply = orjson.loads(payload)
    if "error" in reply:
        record.error = str(reply["error"])[:200]
        return
    meta = reply["meta_info"]
    record.token_s.extend([now_s] * (meta["completion_tokens"] - len(record.token_s)))
    record.reasoning_tokens = meta.get("reasoning_tokens", record.reasoning_tokens)
    reason = meta.get("finish_reason")
    if reason is not None:
        if reason.get("type") == "abort":
            record.error = f"abort: {reason.get('message', '')}"[:200]
        else:
            record.finished = True
