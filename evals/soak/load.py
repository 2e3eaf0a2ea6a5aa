"""Sends the catalogue over and over, and judges every reply as it comes.

A few readers hang up, a few requests are aborted, by their own id or by the beginning of it, and a
few are sent twice under one id.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from evals.load import sse
from evals.soak.bodies import GENERATE, Body
from evals.soak.findings import Findings
from evals.soak.replies import Part, Reply, check

# Seconds that a request may take, whatever happens around it.
REQUEST_TIMEOUT_S = 120.0
# Seconds after the server knows of an instance's death within which its requests have ended.
DEATH_S = 10.0
DIED = "has died"
# Seconds that the end of a reply may be on its way.
LATE_S = 1.0
# Seconds before the next request where a server does not take one.
AGAIN_S = 0.2
# What befalls a request, and how many of a hundred.
FATES = {"hang up": 4, "abort": 4, "abort by prefix": 2, "twice": 3}
ODD_IDS = (
    "with space {}",
    "ümläut-{}-日本語",
    "emoji 🦉 {}",
    'quotes "{}" \' \\ /',
    "line\nbreak {}",
    "{}/../../etc",
    "{} %s {{}} <b>",
    "long " + "x" * 480 + " {}",
)


@dataclass(slots=True)
class Tally:
    """What became of the requests of one kind."""

    sent: int = 0
    whole: int = 0
    cut: int = 0
    refused: int = 0
    failed: int = 0
    different: int = 0


@dataclass(slots=True)
class Load:
    """expected: what each body of the catalogue brought the first time, by reply.

    may_abort: spans in which everybody may be aborted. killed: whether an instance was. gone_at:
    when its server knew.
    asked, answered: replies that were asked for, and that came, whole or aborted.
    """

    session: aiohttp.ClientSession
    bodies: Sequence[Body]
    findings: Findings
    expected: dict[int, dict[int, Part]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    may_abort: list[tuple[float, float]] = field(default_factory=list)
    killed: bool = False
    gone_at: float | None = None
    asked: int = 0
    answered: int = 0
    tokens: int = 0
    tells_status: bool = True
    _number: int = 0

    async def learn(self, concurrency: int) -> None:
        """Send every body once, undisturbed."""
        waiting = list(range(len(self.bodies)))

        async def work() -> None:
            while waiting:
                await self._plain(waiting.pop(), streamed=False)

        await asyncio.gather(*(work() for _ in range(concurrency)))

    async def run(self, seconds: float, concurrency: int, dice: random.Random) -> None:
        """Keep `concurrency` requests in flight for so long, and wait for the last ones."""
        until = time.perf_counter() + seconds
        seeds = [dice.random() for _ in range(concurrency)]
        await asyncio.gather(*(self._work(until, random.Random(seed)) for seed in seeds))

    async def _work(self, until: float, dice: random.Random) -> None:
        names = list(FATES)
        while time.perf_counter() < until:
            place = dice.randrange(len(self.bodies))
            body = self.bodies[place]
            hit = dice.randrange(100) < sum(FATES.values())
            fate = dice.choices(names, list(FATES.values()))[0] if hit else ""
            if not fate or body.refused or len(body.limits) > 1:
                await self._plain(place, streamed=dice.random() < 0.5)
                continue
            self.fates[fate] += 1
            if fate == "hang up":
                await self._hang_up(place, dice)
            elif fate == "twice":
                await self._twice(place)
            else:
                await self._aborted(place, dice, by_prefix=fate != "abort")

    def new_rid(self) -> str:
        self._number += 1
        odd = ODD_IDS[self._number % len(ODD_IDS)] if self._number % 5 == 0 else "soak-{}"
        return odd.format(self._number)

    async def _plain(self, place: int, *, streamed: bool) -> None:
        reply = await self.ask(place, streamed=streamed)
        self.judge(place, reply)
        await self._ask_how_much(reply)

    async def _hang_up(self, place: int, dice: random.Random) -> None:
        streamed = dice.random() < 0.7
        seconds = None if streamed else dice.uniform(0.0, 1.5)
        reply = await self.ask(
            place, streamed=streamed, events=dice.randint(0, 30), seconds=seconds
        )
        self._tally(place).cut += 1
        self._compare_beginning(place, reply)

    async def _aborted(self, place: int, dice: random.Random, *, by_prefix: bool) -> None:
        """Aborted some time after it began; by prefix, a second request ends along with it."""
        streamed = dice.random() < 0.5
        rid = self.new_rid()
        asked = [asyncio.create_task(self.ask(place, streamed=streamed, rid=rid))]
        if by_prefix:
            asked.append(
                asyncio.create_task(self.ask(place, streamed=not streamed, rid=f"{rid}-2"))
            )
        await asyncio.sleep(dice.uniform(0.0, 2.0))
        while not asked[0].done():
            await self.post("/abort_request", {"rid": rid})
            await asyncio.wait(asked, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        for reply in [await task for task in asked]:
            self.judge(place, reply, aborted=True)
            await self._ask_how_much(reply)

    async def _ask_how_much(self, reply: Reply) -> None:
        """An aborted request returns every token that was made. Of several replies SGLang names
        each by itself."""
        part = reply.parts.get(0) if len(reply.body.limits) == 1 else None
        if not self.tells_status or part is None or part.finish != "abort" or part.ids is None:
            return
        made = await self._made(reply.rid)
        if made is not None and made != len(part.ids):
            self.findings.add(
                "tokens lost by an abort", f"{reply.rid!r} made {made}, returned {len(part.ids)}"
            )

    async def _made(self, rid: str) -> int | None:
        """How many tokens the server says that it made for a request that ended."""
        try:
            async with self.session.get("/pascal/status") as answer:
                told = orjson.loads(await answer.read())
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        for instance in told.get("instances", ()):
            for each in instance.get("recent", ()):
                if each["rid"] == rid:
                    return int(each["reasoning_tokens"] + each["answer_tokens"])
        return None

    async def _twice(self, place: int) -> None:
        """The second of two requests with one id is refused while the first is under way. Two
        seconds after the end of a stream SGLang aborts what is under way by its id."""
        rid = self.new_rid()
        began = asyncio.Event()
        first = asyncio.create_task(self.ask(place, streamed=True, rid=rid, began=began))
        started = asyncio.create_task(began.wait())
        await asyncio.wait((first, started), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        second = await self.ask(place, streamed=False, rid=rid)
        reply = await first
        self.judge(place, reply)
        if second.status == 200 and second.sent > reply.ended - LATE_S:
            self.judge(place, second, aborted=True)
        elif second.status not in (400, 0):
            self.findings.add("an id twice", f"{rid!r}: {second.status} {second.error}")

    async def post(self, path: str, fields: Mapping[str, Any], timeout_s: float = 30.0) -> int:
        """The status; 0 where nothing came back in time."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.post(path, json=dict(fields)) as answer,
            ):
                await answer.read()
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return 0

    async def ask(
        self,
        place: int,
        *,
        streamed: bool,
        rid: str | None = None,
        events: int | None = None,
        seconds: float | None = None,
        began: asyncio.Event | None = None,
    ) -> Reply:
        """Send a body. events, seconds: hang up after so many events of the stream, or after so
        long. began: set with the first event."""
        body = self.bodies[place]
        reply = Reply(body, rid or self.new_rid(), streamed, time.perf_counter())
        fields = {**body.fields, "stream": streamed}
        if len(body.limits) == 1:
            fields["rid"] = reply.rid
        if streamed and body.path != GENERATE:
            fields["stream_options"] = {"include_usage": True}
        self._tally(place).sent += 1
        self.asked += len(body.limits)
        try:
            async with (
                asyncio.timeout(REQUEST_TIMEOUT_S if seconds is None else seconds),
                self.session.post(body.path, json=fields) as answer,
            ):
                reply.status = answer.status
                if answer.status != 200:
                    reply.error = (await answer.text())[:300]
                elif not streamed:
                    reply.whole(await answer.read())
                else:
                    async for _, payload in sse.payloads(answer.content):
                        reply.event(payload)
                        if began is not None:
                            began.set()
                        if events is not None and (events := events - 1) < 0:
                            break
        except TimeoutError:
            reply.status, reply.error = 0, "no end"
        except aiohttp.ClientError as error:
            reply.status, reply.error = 0, f"{type(error).__name__}: {error}"
            await asyncio.sleep(AGAIN_S)
        except (ValueError, LookupError, TypeError) as error:
            reply.fault(f"not an answer of SGLang: {error!r}"[:300])
        reply.ended = time.perf_counter()
        return reply

    def _tally(self, place: int) -> Tally:
        return self.tallies.setdefault(self.bodies[place].kind, Tally())

    def judge(self, place: int, reply: Reply, *, aborted: bool = False) -> None:
        """Note what is wrong with a reply that was waited for."""
        body, tally = self.bodies[place], self._tally(place)
        name = f"{body.kind}, {'stream' if reply.streamed else 'whole'}, {reply.rid[:40]!r}"
        aborted = aborted or any(b <= reply.ended and reply.sent <= e for b, e in self.may_abort)
        if body.refused:
            tally.refused += 1
            if reply.status != 400:
                self.findings.add("not refused", f"{name}: {reply.status} {reply.error}")
            return
        if reply.status != 200:
            if self._may_have_died(reply):
                tally.failed += 1
            elif not (aborted and reply.status in (400, 499, 503)):
                kind = "never ended" if reply.error == "no end" else "failed"
                self.findings.add(kind, f"{name}: {reply.status} {reply.error}")
            return
        self.answered += len(reply.parts)
        check(reply, aborted=aborted)
        for fault in reply.faults:
            self.findings.add("not in order", f"{name}: {fault}")
        self.tokens += sum(len(p.ids or ()) for p in reply.parts.values())
        if any(part.finish == "abort" for part in reply.parts.values()):
            tally.cut += 1
            self._compare_beginning(place, reply)
            return
        tally.whole += 1
        expected = self.expected.setdefault(place, reply.parts)
        found = [p.differs(expected[i]) for i, p in reply.parts.items() if i in expected]
        if any(found):
            tally.different += 1
            if body.same:
                self.findings.add("another text", f"{name}: {[f for f in found if f]}")

    def _may_have_died(self, reply: Reply) -> bool:
        """Whether this is how a request of the instance that was killed has to end."""
        if not self.killed:
            return False
        gone = math.inf if self.gone_at is None else self.gone_at
        if not reply.sent < gone + 1.0 or reply.ended > gone + DEATH_S:
            return False
        return reply.status == 503 and DIED in (reply.error or "")

    def _compare_beginning(self, place: int, reply: Reply) -> None:
        if not self.bodies[place].same or place not in self.expected:
            return
        for index, part in reply.parts.items():
            whole = self.expected[place].get(index)
            if whole is not None and not part.is_begun_of(whole):
                self.findings.add("another text", f"{self.bodies[place].kind}, cut: {reply.rid!r}")
