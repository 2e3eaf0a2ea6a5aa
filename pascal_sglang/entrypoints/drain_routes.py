"""`POST /pascal/drain` and `POST /pascal/undrain`: what they take, and the controller's answer."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
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
from pascal_sglang.entrypoints.json_body import object_in
from pascal_sglang.entrypoints.server_drain import LONGEST_NOTICE_S, ServerDrain
from pascal_sglang.request_checks import is_number

DRAIN_PATH, UNDRAIN_PATH = "/pascal/drain", "/pascal/undrain"
# For the controller to answer, in seconds, and how often to look whether it has.
ANSWER_S = 25.0
LOOK_S = 0.01


class ControllerLine:
    """Asks the controller. place: that of the control sockets. instances: their number."""

    def __init__(self, place: str, instances: int) -> None:
        self.instances = instances
        self._receiver = ControlReceiver(place, FRONT_END, instances)
        self._sender = ControlSender(place, FRONT_END)
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request's body names: an instance, or the whole server, and the notice for it."""

    dp_rank: int | None = None
    notice_s: float | None = None


def asked_in(body: bytes, instances: int) -> Asked:
    """Raises: ValueError with one line."""
    asked = object_in(body or b"{}")
    if unknown := sorted(asked.keys() - {"dp_rank", "notice_s"}):
        raise ValueError(f"the body has unknown fields: {', '.join(map(ascii, unknown))[:200]}")
    if "dp_rank" in asked:
        if "notice_s" in asked:
            raise ValueError("notice_s is for the whole server, not for an instance")
        return Asked(dp_rank=_rank(asked["dp_rank"], instances))
    notice_s = asked.get("notice_s")
    if notice_s is not None and not (is_number(notice_s) and 0 <= notice_s <= LONGEST_NOTICE_S):
        raise ValueError(f"notice_s must be a number from 0 to {LONGEST_NOTICE_S:g}")
    return Asked(notice_s=notice_s)


def _rank(rank: object, instances: int) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < instances:
        raise ValueError(f"dp_rank must be a whole number from 0 to {instances - 1}")
    return rank


def add_routes(app: Any, places: list[str], instances: int, server: ServerDrain) -> None:
    """Serve both. places: that of the control sockets of this server; empty without a
    controller."""
    lines: dict[str, ControllerLine] = {}

    async def ask(request: Request, *, drain: bool) -> dict[str, Any]:
        try:
            asked = asked_in(await request.body(), instances)
        except ValueError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
        if asked.dp_rank is None:
            return ask_server(asked.notice_s, drain=drain)
        return await ask_controller(asked.dp_rank, drain=drain)

    def ask_server(notice_s: float | None, *, drain: bool) -> dict[str, Any]:
        if drain:
            server.begin(notice_s)
        elif notice_s is not None:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "notice_s is for a drain")
        elif problem := server.end():
            raise HTTPException(HTTPStatus.CONFLICT, problem)
        return server.describe()

    async def ask_controller(rank: int, *, drain: bool) -> dict[str, Any]:
        if not places:
            problem = (
                "this server has one instance: there is no other one for its requests; "
                "without a dp_rank the whole server is drained"
            )
            raise HTTPException(HTTPStatus.CONFLICT, problem)
        place = places[-1]
        if place not in lines:
            lines[place] = ControllerLine(place, instances)
        reply = await lines[place].ask(rank, drain=drain)
        if reply is None:
            raise HTTPException(HTTPStatus.GATEWAY_TIMEOUT, "the controller does not answer")
        if reply.problem:
            raise HTTPException(HTTPStatus.CONFLICT, reply.problem)
        return {"dp_rank": rank, **reply.progress.describe()}

    # They change whom the server's requests go to: for the operator, as the status.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def drain(request: Request) -> dict[str, Any]:
        """Move every request off an instance, and send no new one there; or let the whole server
        finish its requests, and refuse new ones. How far that is."""
        return await ask(request, drain=True)

    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def undrain(request: Request) -> dict[str, Any]:
        """Let an instance, or the whole server, take requests again."""
        return await ask(request, drain=False)

    app.post(DRAIN_PATH)(drain)
    app.post(UNDRAIN_PATH)(undrain)
