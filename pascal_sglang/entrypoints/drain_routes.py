"""`POST /pascal/drain` and `POST /pascal/undrain`: what they take, and the controller's answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request
from sglang.srt.utils.auth import AuthLevel, auth_level

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import (
    CONTROLLER,
    FRONT_END,
    ControlReceiver,
    ControlSender,
)
from pascal_sglang.cluster.messages import DrainReply, DrainRequest

DRAIN_PATH, UNDRAIN_PATH = "/pascal/drain", "/pascal/undrain"
# For the controller to answer, in seconds, and how often to look whether it has.
ANSWER_S = 5.0
LOOK_S = 0.01


class ControllerLine:
    """Asks the controller. folder: that of the control sockets. instances: their number."""

    def __init__(self, folder: str, instances: int) -> None:
        self.instances = instances
        self._receiver = ControlReceiver(folder, FRONT_END, instances)
        self._sender = ControlSender(folder)
        self._numbers = itertools.count()
        # By the questions that are waited for; None until there is one.
        self._replies: dict[int, DrainReply | None] = {}

    async def ask(self, dp_rank: int, *, drain: bool) -> DrainReply | None:
        """What the controller says; None if it says nothing in time."""
        number = next(self._numbers)
        if not self._sender.send(CONTROLLER, DrainRequest(number, dp_rank, drain)):
            return None
        until = clock.now() + ANSWER_S
        self._replies[number] = None
        try:
            while self._replies[number] is None and clock.now() < until:
                await asyncio.sleep(LOOK_S)
                self._hear()
            return self._replies[number]
        finally:
            del self._replies[number]

    def _hear(self) -> None:
        """Take in what has come; a reply that comes too late is dropped."""
        for data in self._receiver.receive():
            read = self._receiver.read(data)
            reply = None if read is None else read[1]
            if isinstance(reply, DrainReply) and reply.number in self._replies:
                self._replies[reply.number] = reply


def rank_in(body: bytes, instances: int) -> int:
    """The instance that a request's body names. Raises: ValueError with one line."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError('the body must be JSON: {"dp_rank": 0}') from None
    if not isinstance(asked, dict) or "dp_rank" not in asked:
        raise ValueError('the body must have a dp_rank: {"dp_rank": 0}')
    if unknown := sorted(asked.keys() - {"dp_rank"}):
        raise ValueError(f"the body has unknown fields: {', '.join(map(ascii, unknown))[:200]}")
    rank = asked["dp_rank"]
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < instances:
        raise ValueError(f"dp_rank must be a whole number from 0 to {instances - 1}")
    return rank


def add_routes(app: Any, status_files: list[str], instances: int) -> None:
    """Serve both. status_files: where the controller of this server shows itself, in the folder of
    the control sockets; empty without a controller."""
    lines: dict[str, ControllerLine] = {}

    async def ask(request: Request, *, drain: bool) -> dict[str, Any]:
        if not status_files:
            problem = "this server has one instance: there is no other one for its requests"
            raise HTTPException(HTTPStatus.CONFLICT, problem)
        try:
            rank = rank_in(await request.body(), instances)
        except ValueError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
        folder = os.path.dirname(status_files[-1])
        if folder not in lines:
            lines[folder] = ControllerLine(folder, instances)
        reply = await lines[folder].ask(rank, drain=drain)
        if reply is None:
            raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, "the controller does not answer")
        if reply.problem:
            raise HTTPException(HTTPStatus.CONFLICT, reply.problem)
        return {"dp_rank": rank, **reply.progress.describe()}

    # They change whom the server's requests go to: for the operator, as the status.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def drain(request: Request) -> dict[str, Any]:
        """Move every request off an instance, and send no new one there; how far that is."""
        return await ask(request, drain=True)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def undrain(request: Request) -> dict[str, Any]:
        """Let an instance take requests again."""
        return await ask(request, drain=False)

    app.post(DRAIN_PATH)(drain)
    app.post(UNDRAIN_PATH)(undrain)
