"""A small OpenAI-like chat server in a thread; what it streams is up to the test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer


@dataclass(frozen=True)
class Script:
    """What one prompt gets: pieces of thinking, then of the answer, and how it ends.

    status: other than 200, nothing is streamed. ends: with a finish reason, or the stream just
    closes. hangs: after its thinking, until the client goes. ctrl_c: before it hangs, this process
    gets SIGINT. together: it waits until so many requests have been open at one time.
    """

    thinking: Sequence[str] = ("Let me ", "see.")
    answer: Sequence[str] = ("I do ", "not know.")
    usage: dict[str, Any] | None = None
    status: int = 200
    ends: bool = True
    hangs: bool = False
    ctrl_c: bool = False
    together: int = 1
    error: str | None = None
    thinking_key: str = "reasoning_content"


class ChatServer:
    """bodies: what was asked, in order. most: requests open at one time. keys: Authorization."""

    def __init__(self, script: Callable[[str], Script]) -> None:
        self._script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most = 0
        self.base_url = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> ChatServer:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._crowd = asyncio.Condition()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        async with TestServer(app, shutdown_timeout=0.1) as server:
            self.base_url = str(server.make_url("/")).rstrip("/")
            self._started.set()
            await self._stop.wait()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "small"}, {"id": "other"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        script = self._script(body["messages"][0]["content"])
        if script.status != 200:
            return web.Response(status=script.status, text="no")
        async with self._crowd:
            self.open += 1
            self.most = max(self.most, self.open)
            self._crowd.notify_all()
            await self._crowd.wait_for(lambda: self.most >= script.together)
        try:
            return await self._stream(request, script)
        finally:
            self.open -= 1

    async def _stream(self, request: web.Request, script: Script) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)

        async def send(event: object) -> None:
            data = b"data: " + json.dumps(event).encode() + b"\n\n"
            # Cut where a network might: in the middle of an event.
            await reply.write(data[:20])
            await reply.write(data[20:])

        async def delta(finish: str | None = None, **fields: str) -> None:
            await send({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})

        await delta(role="assistant", content="")
        for piece in script.thinking:
            await delta(**{script.thinking_key: piece})
        if script.ctrl_c:
            os.kill(os.getpid(), signal.SIGINT)
        if script.hangs:
            await asyncio.sleep(60)
        if script.error:
            await send({"error": {"message": script.error}})
        for piece in script.answer:
            await delta(content=piece)
        if script.ends:
            await delta(finish="stop")
            if script.usage:
                await send({"choices": [], "usage": script.usage})
            await reply.write(b"data: [DONE]\n\n")
        return reply
