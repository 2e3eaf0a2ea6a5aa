"""What an operator does to a server under load, each with what has to come of it."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from evals.soak.load import Load

# Seconds that an operation may take; an update waits for the requests in flight.
ANSWER_S = 60.0
LOOK_S = 20.0
PAUSE_S = 0.5
# Seconds between two operations, where there is time for more than one of each.
EVERY_S = 5.0
LONG_ID = 5_000
LOOKED_AT = ("/health", "/pascal/status", "/metrics", "/v1/loads", "/server_info")
JUNK = (
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b'{"text": 7}', "application/json"),
    (b"\xff\xfe", "text/plain"),
    (b'{"rid": {"a": 1}, "text": "x"}', "application/json"),
)


@dataclass(slots=True)
class Operator:
    """model: the folder whose weights are loaded again; what changes is their version alone."""

    load: Load
    base_url: str
    model: str
    paths: Sequence[str] = LOOKED_AT
    done: dict[str, int] = field(default_factory=dict)
    slowest_s: dict[str, float] = field(default_factory=dict)
    _version: int = 0

    async def run(self, names: Sequence[str], seconds: float, dice: random.Random) -> None:
        """Every operation at least once, spread over so many seconds, in an order of the dice."""
        rounds = max(1, round(seconds / EVERY_S / max(1, len(names))))
        order = [name for _ in range(rounds) for name in dice.sample(list(names), len(names))]
        gap = seconds / (len(order) + 1)
        for name in order:
            await asyncio.sleep(gap)
            await self.carry_out(name)

    async def carry_out(self, name: str) -> None:
        began = time.perf_counter()
        try:
            await OPERATIONS[name](self)
        except (OSError, aiohttp.ClientError) as error:
            self._wrong(name, f"{type(error).__name__}: {error}")
        self.done[name] = self.done.get(name, 0) + 1
        took = time.perf_counter() - began
        self.slowest_s[name] = max(took, self.slowest_s.get(name, 0.0))

    def _wrong(self, name: str, what: str) -> None:
        self.load.findings.add(f"operation: {name}", what)

    async def _expect(
        self, name: str, path: str, fields: Mapping[str, Any], *statuses: int
    ) -> None:
        status = await self.load.post(path, fields, ANSWER_S)
        if status not in (statuses or (200,)):
            told = f"status {status}" if status else f"no answer in {ANSWER_S:g} s"
            self._wrong(name, f"{path}: {told}")

    async def _continue(self, name: str) -> None:
        await self._expect(name, "/continue_generation", {"torch_empty_cache": False})

    async def _update(self, name: str, **fields: Any) -> None:
        self._version += 1
        fields |= {"model_path": self.model, "weight_version": f"v{self._version}"}
        await self._expect(name, "/update_weights_from_disk", fields)

    async def retract(self) -> None:
        """As reinforcement learning does it: everybody out, new weights, on with the new ones."""
        name = "retract, flush, update"
        await self._expect(name, "/pause_generation", {"mode": "retract"})
        await asyncio.sleep(PAUSE_S)
        await self._expect(name, "/flush_cache", {})
        await self._update(name, flush_cache=True)
        await self._continue(name)

    async def in_place(self) -> None:
        name = "pause in place, update"
        await self._expect(name, "/pause_generation", {"mode": "in_place"})
        await asyncio.sleep(PAUSE_S)
        await self._update(name, flush_cache=False)
        await self._continue(name)

    async def pause_aborting(self) -> None:
        name = "pause by abort"
        began = time.perf_counter()
        self.load.may_abort.append((began, began + ANSWER_S))
        await self._expect(name, "/pause_generation", {"mode": "abort"})
        await self._continue(name)
        self.load.may_abort[-1] = (began, time.perf_counter())

    async def update(self) -> None:
        await self._update("update")

    async def update_aborting(self) -> None:
        began = time.perf_counter()
        self.load.may_abort.append((began, began + ANSWER_S))
        await self._update("update, aborting", abort_all_requests=True)
        self.load.may_abort[-1] = (began, time.perf_counter())

    async def abort_all(self) -> None:
        began = time.perf_counter()
        self.load.may_abort.append((began, began + ANSWER_S))
        await self._expect("abort all", "/abort_request", {"abort_all": True})
        # The schedulers hear of it a moment later, one after the other.
        await asyncio.sleep(PAUSE_S)
        self.load.may_abort[-1] = (began, time.perf_counter())

    async def flush(self) -> None:
        """A busy server may refuse."""
        await self._expect("flush", "/flush_cache", {}, 200, 400)

    async def flush_at_rest(self) -> None:
        await self._expect("flush at rest", "/flush_cache", {})

    async def look(self) -> None:
        for path in self.paths:
            try:
                async with (
                    asyncio.timeout(LOOK_S),
                    self.load.session.get(path) as answer,
                ):
                    await answer.read()
                    if answer.status != 200:
                        self._wrong("look", f"{path}: status {answer.status}")
            except TimeoutError:
                self._wrong("look", f"{path}: no answer in {LOOK_S:g} s")

    async def long_ids(self) -> None:
        """Served or refused, and forgotten."""
        fields = {"text": "short", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        for number in range(3):
            rid = f"{number}-{self.done.get('long ids', 0)}-" + "i" * LONG_ID
            self.load.asked += 1
            await self._expect("long ids", "/generate", fields | {"rid": rid}, 200, 400)

    async def junk(self) -> None:
        """Bodies that are no requests, and connections that say half of one or nothing."""
        for data, kind in JUNK:
            async with (
                asyncio.timeout(LOOK_S),
                self.load.session.post(
                    "/generate", data=data, headers={"Content-Type": kind}
                ) as answer,
            ):
                await answer.read()
                if not 400 <= answer.status < 500:
                    self._wrong("junk", f"{data!r}: status {answer.status}")
        await asyncio.to_thread(self._half_said)

    def _half_said(self) -> None:
        address = urlsplit(self.base_url)
        host = (address.hostname or "127.0.0.1", address.port or 80)
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n"
        for said in (b"", b"POST /gen", head, head + b'\r\n{"text": "a'):
            with socket.create_connection(host, timeout=LOOK_S) as client:
                client.sendall(said)


OPERATIONS: Mapping[str, Callable[[Operator], Awaitable[None]]] = {
    "retract, flush, update": Operator.retract,
    "pause in place, update": Operator.in_place,
    "pause by abort": Operator.pause_aborting,
    "update": Operator.update,
    "update, aborting": Operator.update_aborting,
    "abort all": Operator.abort_all,
    "flush": Operator.flush,
    "look": Operator.look,
    "junk": Operator.junk,
    "long ids": Operator.long_ids,
}
