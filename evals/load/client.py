"""An open-loop client of `/generate`: requests leave when they are due, whatever came back.

Only the later turns of a conversation wait: each for the turn before it, and then for its pause.
"""

from __future__ import annotations

import asyncio
import resource
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import orjson

from evals.load import auth, sse
from evals.load.items import Item
from evals.load.prompt import Conversation, Reply, new_part
from evals.load.record import Record, breaks_of
from evals.load.timeline import sample

LAG_PROBE_S = 0.01
LAG_LIMIT_MS = 20.0
FILES_OF_OURS = 256
NOT_SENT = "not sent: an earlier turn failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to send.

    logit_processor: serialized processor that ends thinking after
        `custom_params["thinking_budget"]` tokens.
    request_timeout_s, run_timeout_s: bounds of one request and of a whole replay.
    max_concurrency: the most requests at one time, None for no bound. One that is held back is due
        when its turn comes, as in `sglang.benchmark.serving`.
    end_of_thinking: the marker as text, to leave thinking out of the next turn of a text prompt.
    sampling: more of SGLang's sampling parameters, of every request.
    answer_tpot_ms: the reader's pace, told to a server that schedules by it; None leaves it to the
        server.
    headers: more of them, of every request.
    own_lengths: the server is not told how long requests think and answer, up to so many tokens
        together; the processor (`demo.budget.TinyOwnLengths`) is. None: it is told.
    """

    base_url: str
    logit_processor: str
    request_timeout_s: float = 300.0
    run_timeout_s: float = 600.0
    max_concurrency: int | None = None
    end_of_thinking: str = "</think>"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    answer_tpot_ms: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    own_lengths: int | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """What came back, in the order of the items; `lag_p99_ms` is the client's own lateness, beyond
    `LAG_LIMIT_MS` its times are not to be trusted."""

    records: list[Record]
    lag_p99_ms: float


def request_body(
    item: Item,
    index: int,
    seed: int,
    logit_processor: str,
    said: Conversation | None = None,
    rid: str | None = None,
) -> dict[str, Any]:
    """`said`: the conversation this is the next turn of. `index` and `seed`: see `new_part`. `rid`:
    the request's name at the server, which makes one up by itself."""
    prompt = new_part(item, index, seed)
    if said is not None:
        prompt = said.ask(prompt)
    return {
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "rid": rid,
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
    return asyncio.run(open_loop(items, target, seed))


async def open_loop(
    items: Sequence[Item], target: Target, seed: int, records: list[Record] | None = None
) -> Replay:
    """`replay` inside a running event loop. `records`: an empty list, filled at once and kept up to
    date, for a caller who wants to watch."""
    records = [] if records is None else records
    records += [Record(arrival_s=item.arrival_s) for item in items]
    _allow_files(len(items))
    gate = asyncio.Semaphore(target.max_concurrency or max(1, len(items)))
    lags_s: list[float] = []
    tasks = [asyncio.create_task(_watch_lag(lags_s))]
    # Every reader connects, and waits for that, too; limit 0: never queue behind a stream.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    try:
        async with (
            aiohttp.ClientSession(
                target.base_url,
                connector=connector,
                headers=auth.headers() | dict(target.headers),
                timeout=aiohttp.ClientTimeout(total=None),
            ) as session,
            asyncio.timeout(target.run_timeout_s),
        ):
            start = time.perf_counter()
            streams = []
            rids = {place: uuid.uuid4().hex for place in sample(items)}
            for turns in conversations(items):
                asked = [(i, items[i], records[i]) for i in turns]
                talk = _Talk(session, target, gate, seed, asked, rids)
                body = talk.body(0)
                await _until(start + items[turns[0]].arrival_s)
                streams.append(asyncio.create_task(talk.run(body, start)))
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


def _allow_files(streams: int) -> None:
    """As many open files as there may be streams, as far as this user may ask for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = streams + FILES_OF_OURS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _watch_lag(lags_s: list[float]) -> None:
    """How late this event loop wakes, in seconds; every time stamp carries that error."""
    while True:
        due = time.perf_counter() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        lags_s.append(time.perf_counter() - due)


def conversations(items: Sequence[Item]) -> list[list[int]]:
    """Places in `items` of what is sent one after the other, in the order the first are due."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, item in enumerate(items):
        alone = item.conversation is None
        key = ("item", place) if alone else ("conversation", item.conversation or 0)
        groups.setdefault(key, []).append(place)
    return sorted(groups.values(), key=lambda places: items[places[0]].arrival_s)


class _Talk:
    """The turns of one conversation; a request by itself is one of a single turn.

    turns: place in the workload, item and record of each. rids: names by place, of those whose
        breaks are wanted.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        gate: asyncio.Semaphore,
        seed: int,
        turns: Sequence[tuple[int, Item, Record]],
        rids: Mapping[int, str],
    ) -> None:
        self._session, self._target, self._seed, self._turns = session, target, seed, turns
        self._gate, self._rids = gate, rids
        self._said = Conversation(target.end_of_thinking)

    def body(self, turn: int) -> bytes:
        """The request of a turn; the turns before it have been answered."""
        place, item, _ = self._turns[turn]
        processor = self._target.logit_processor
        rid = self._rids.get(place)
        body = request_body(item, place, self._seed, processor, self._said, rid)
        if self._target.own_lengths is not None:
            lengths = [item.thinking_tokens, item.answer_tokens]
            body["sampling_params"] |= {
                "ignore_eos": False,
                "max_new_tokens": self._target.own_lengths,
                "custom_params": {"own_lengths": lengths},
            }
        body["sampling_params"] |= self._target.sampling
        if self._target.answer_tpot_ms is not None:
            pace = {"answer_tpot_ms": self._target.answer_tpot_ms}
            body["sampling_params"]["custom_params"]["pascal"] = pace
        return orjson.dumps(body)

    async def run(self, body: bytes, start: float) -> None:
        """Send the first turn now and every other its pause after the one before it ended."""
        for turn, (place, _, record) in enumerate(self._turns):
            last = turn + 1 == len(self._turns)
            reply = None if last else Reply()
            held = self._gate.locked()
            async with self._gate:
                if held:
                    record.arrival_s = time.perf_counter() - start
                await _stream(self._session, body, record, start, self._target, reply)
            if place in self._rids:
                record.breaks = await breaks_of(self._session, self._rids[place])
            if reply is None:
                return
            if record.error is not None:
                for _, _, later in self._turns[turn + 1 :]:
                    later.error = NOT_SENT
                return
            _, item, later = self._turns[turn + 1]
            later.arrival_s = max(record.token_s, default=record.arrival_s) + item.pause_s
            self._said.answered(reply, record.reasoning_tokens)
            body = self.body(turn + 1)
            await _until(start + later.arrival_s)


async def _until(due: float) -> None:
    """Sleep until then, and not a moment less: the event loop has a clock of its own."""
    while (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(left)


async def _stream(
    session: aiohttp.ClientSession,
    body: bytes,
    record: Record,
    start: float,
    target: Target,
    reply_out: Reply | None,
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
            async for now, payload in sse.payloads(reply.content):
                seen = note_event(record, payload, now - start)
                if reply_out is not None and seen is not None:
                    reply_out.add(seen)
    except TimeoutError:
        record.error = "timeout (request)"
    except aiohttp.ClientError as error:
        record.error = f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, TypeError) as error:
        record.error = f"not an answer of SGLang: {error!r}"[:200]
    if record.error is None and not record.finished:
        record.error = "stream ended early"


def note_event(record: Record, payload: bytes, now_s: float) -> dict[str, Any] | None:
    """Add one event; every token it brings gets the event's time. What the event says of the
    output, or None for an error."""
    reply: dict[str, Any] = orjson.loads(payload)
    if "error" in reply:
        record.error = str(reply["error"])[:200]
        return None
    meta = reply["meta_info"]
    record.token_s.extend([now_s] * (meta["completion_tokens"] - len(record.token_s)))
    record.reasoning_tokens = meta.get("reasoning_tokens", record.reasoning_tokens)
    reason = meta.get("finish_reason")
    if reason is not None:
        if reason.get("type") == "abort":
            record.error = f"abort: {reason.get('message', '')}"[:200]
        else:
            record.finished = True
    return reply
