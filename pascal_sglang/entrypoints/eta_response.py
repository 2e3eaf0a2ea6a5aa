"""What came of a request (`answer_eta`), in its response: headers, comments in a stream, or 503.

A route may begin its stream before SGLang has parsed the request. Such a beginning is held until
the request has been decided on: then there are headers to add to it, or a refusal to send instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

from pascal_sglang.entrypoints import answer_eta
from pascal_sglang.entrypoints.answer_eta import AnswerEta, Exchange, Overloaded
from pascal_sglang.entrypoints.http_errors import (
    RETRY_HEADER,
    Header,
    Message,
    Send,
    send_error,
)

ETA_HEADER, BUDGET_HEADER = b"x-pascal-answer-eta", b"x-pascal-thinking-budget"
# Of a request: asks for comments where its body has no `custom_params`.
COMMENTS_HEADER = b"x-pascal-eta-comments"
# Seconds between two comments in a stream.
COMMENT_S = 1.0
# For how long the beginning of a stream is held at most: seconds between looks, and looks. A loop
# that stands still meanwhile, which a decision waits for as well, has had one look.
HOLD_LOOK_S, HOLD_LOOKS = 0.05, 20
EVENTS, LINES = b"text/event-stream", b"application/x-ndjson"
ABOUT_BODIES = (b"content-type", b"content-length", b"content-encoding")


class AnswerEtaMiddleware:
    """ASGI: gives every request an `Exchange`, and its response what came of it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        # SGLang takes `PUT /generate` as well.
        takes = scope["type"] == "http" and scope["method"] in ("POST", "PUT")
        eta = answer_eta.active()
        if not takes or eta is None:
            await self.app(scope, receive, send)
            return
        exchange = Exchange()
        response = Response(send, exchange, eta)
        asks = dict(scope.get("headers", ())).get(COMMENTS_HEADER, b"false")
        if asks not in (b"true", b"false"):
            shown = f"{asks.decode('latin-1')!r:.40}"
            why = f"{COMMENTS_HEADER.decode()} must be true or false, not {shown}"
            await response.fail(HTTPStatus.BAD_REQUEST, why)
            return
        exchange.comments = asks == b"true"
        try:
            with answer_eta.taking_part(exchange):
                await self.app(scope, receive, response.send)
        except Overloaded:
            # A route that answers no ValueError. Once a reply has begun, it can only break off.
            if not await response.refuse():
                raise
        finally:
            response.end()


class Response:
    """The response to one request, on its way out."""

    def __init__(self, send: Send, exchange: Exchange, eta: AnswerEta) -> None:
        self._send = send
        self._exchange = exchange
        self._eta = eta
        self._lock = asyncio.Lock()
        # Messages of a stream that began too soon, and what waits until it may.
        self._held: list[Message] = []
        self._waiter: asyncio.Task[None] | None = None
        self._comments: asyncio.Task[None] | None = None
        self._begun = self._replaced = self._over = False

    async def send(self, message: Message) -> None:
        async with self._lock:
            if message["type"] == "http.response.start":
                if _kind(message) in (EVENTS, LINES) and not self._exchange.decided.is_set():
                    self._held.append(message)
                    self._waiter = asyncio.create_task(self._wait())
                else:
                    await self._start(message)
            elif self._held and message.get("more_body", False):
                self._held.append(message)
            else:
                await self._let_go()
                await self._go_on(message)

    async def _wait(self) -> None:
        """Until the request of a stream that began too soon has been decided on."""
        for _ in range(HOLD_LOOKS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_LOOK_S):
                    await self._exchange.decided.wait()
                    break
        async with self._lock:
            with contextlib.suppress(OSError):  # The client has gone.
                await self._let_go()

    async def _let_go(self) -> None:
        held, self._held = self._held, []
        for message in held:
            if message["type"] == "http.response.start":
                await self._start(message)
            else:
                await self._go_on(message)

    async def _go_on(self, message: Message) -> None:
        if self._replaced:
            return
        self._over = self._over or not message.get("more_body", False)
        await self._send(message)

    async def refuse(self) -> bool:
        """Answer 503 where that has been decided and no reply has begun; whether the client has
        that answer. The beginning of a stream that waited for the decision may have become it."""
        async with self._lock:
            if self._replaced:
                return True
            replaced = self._held[0]["headers"] if self._held else ()
            self._held = []
            return await self._refuse(replaced)

    async def _refuse(self, replaced: Iterable[Header]) -> bool:
        """503 instead of whatever SGLang makes of the error. replaced: headers of that, of which
        those about its body go."""
        exchange = self._exchange
        if exchange.refusal is None or self._begun:
            return False
        kept = [each for each in replaced if each[0].lower() not in ABOUT_BODIES]
        retry = (RETRY_HEADER, str(exchange.retry_s).encode())
        await self.fail(
            HTTPStatus.SERVICE_UNAVAILABLE,
            exchange.refusal,
            [*kept, retry, *headers_of(exchange)],
        )
        return True

    async def _start(self, message: Message) -> None:
        if await self._refuse(message.get("headers", ())):
            return
        self._begun = True
        exchange = self._exchange
        headers = [*message.get("headers", ()), *headers_of(exchange)]
        await self._send({**message, "headers": headers})
        if exchange.comments and _kind(message) == EVENTS:
            self._comments = asyncio.create_task(self._comment())

    async def fail(self, status: HTTPStatus, why: str, headers: Iterable[Header] = ()) -> None:
        """An error in SGLang's form of one, as the whole reply."""
        self._begun = self._replaced = True
        await send_error(self._send, status, why, headers)

    async def _comment(self) -> None:
        """Say once in a while when the answer is expected, as a comment, which clients skip."""
        while not (self._over or self._exchange.answers):
            left = self._eta.seconds_left(self._exchange)
            if left is not None:
                text = f": pascal-answer-eta {left[0]:.2f};{left[1]:.2f}\n\n"
                async with self._lock:
                    if self._over:
                        return
                    body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                    with contextlib.suppress(OSError):
                        await self._send(body)
            await asyncio.sleep(COMMENT_S)

    def end(self) -> None:
        for task in (self._waiter, self._comments):
            if task is not None:
                task.cancel()


def _kind(message: Message) -> bytes:
    """Of the body that a response begins with, without parameters."""
    kind: bytes = dict(message.get("headers", ())).get(b"content-type", b"")
    return kind.partition(b";")[0].strip()


def headers_of(exchange: Exchange) -> Iterator[Header]:
    """What a response says of its request."""
    if (estimate := exchange.estimate) is not None:
        yield ETA_HEADER, f"{estimate.p50:.2f};{estimate.p90:.2f}".encode()
    if exchange.budget is not None:
        tokens, why = exchange.budget
        yield BUDGET_HEADER, f"{tokens};{why}".encode()
