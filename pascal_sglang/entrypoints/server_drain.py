"""The whole server taken out of its load balancer: its health says so, then it refuses requests.

| the server | on | becomes |
|---|---|---|
| serving | `begin`, or SGLang was told to end (SIGTERM) | draining: its health answers 503 |
| draining | the notice has passed | it also refuses new requests, with 503 and `Retry-After` |
| draining, refusing | no request is left | drained |
| draining, drained | `end`, unless SGLang was told to end | serving |

The notice is for what watches the health: until it has seen it, new requests are served. Requests
under way go on in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from sglang.srt.utils.auth import AuthLevel

from pascal_sglang import clock
from pascal_sglang.cluster.drains import DRAINED, DRAINING, SERVING
from pascal_sglang.entrypoints.http_errors import RETRY_HEADER, Send, send_error

logger = logging.getLogger(__name__)

# Seconds between the first 503 of the health and the first refusal, where nobody says otherwise;
# and the most that may be asked for.
NOTICE_S, LONGEST_NOTICE_S = 5.0, 3600.0
# What a refusal names, in seconds: another server takes the request at once.
RETRY_S = 1
HEALTH_PATHS = frozenset({"/health", "/health_generate", "/ready", "/ping"})
# Of clients, for requests that are under way already.
ABOUT_OTHERS = frozenset({"/close_session"})
# Of a WebSocket that is closed: try again later.
TRY_AGAIN = 1013


class ServerDrain:
    """Whether the server takes requests.

    told_to_end: whether SGLang waits for its last request, as after SIGTERM. on_refused: called for
    each request that is refused.
    """

    def __init__(
        self, told_to_end: Callable[[], bool], on_refused: Callable[[], None] = lambda: None
    ) -> None:
        self._told_to_end = told_to_end
        self.on_refused = on_refused
        # Requests of clients under way.
        self.left = 0
        # When it began, and from when on requests are refused, in seconds; None while it serves.
        self._since: float | None = None
        self._refuse_at = float("inf")

    def begin(self, notice_s: float | None = None) -> None:
        """Drain the server. Of several notices, in seconds, the one that ends first holds; None is
        `NOTICE_S` where there is none yet."""
        now = clock.now()
        if self._since is None:
            self._since = now
            notice_s = NOTICE_S if notice_s is None else notice_s
            logger.warning("pascal_sglang: the server is drained; %d requests are left", self.left)
        if notice_s is not None:
            self._refuse_at = min(self._refuse_at, now + notice_s)

    def end(self) -> str:
        """The server takes requests again. Returns why not, or nothing."""
        if self._told_to_end():
            return "The server was told to end, and ends."
        if self._since is not None:
            logger.warning("pascal_sglang: the server takes requests again")
        self._since, self._refuse_at = None, float("inf")
        return ""

    def is_on(self) -> bool:
        """Whether it is drained, or ends."""
        if self._since is None and self._told_to_end():
            self.begin()
        return self._since is not None

    def refuses(self) -> bool:
        """Whether new requests are refused."""
        return self.is_on() and clock.now() >= self._refuse_at

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one that was taken."""
        self.left += 1
        try:
            yield
        finally:
            self.left -= 1

    def describe(self) -> dict[str, Any]:
        """How far it is, for the status and whoever asked for it."""
        if not self.is_on() or self._since is None:
            return {"state": SERVING, "left": self.left, "refuses": False, "seconds": 0.0}
        refuses = self.refuses()
        return {
            "state": DRAINED if refuses and not self.left else DRAINING,
            "left": self.left,
            "refuses": refuses,
            "seconds": round(clock.now() - self._since, 3),
        }


class ServerDrainMiddleware:
    """ASGI: answers for a server that is drained, and counts the requests that it has taken."""

    def __init__(self, app: Any, drain: ServerDrain, routes: list[Any]) -> None:
        """routes: SGLang's and ours, as they are when the first request comes."""
        self.app = app
        self._drain = drain
        self._routes = routes
        self._of_clients: frozenset[str] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif _asks_for_health(scope):
            if self._drain.is_on():
                await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, "The server is drained.")
            else:
                await self.app(scope, receive, send)
        elif not self._is_new_request(scope):
            await self.app(scope, receive, send)
        elif self._drain.refuses():
            self._drain.on_refused()
            await _refuse(scope, send)
        else:
            with self._drain.request():
                await self.app(scope, receive, send)

    def _is_new_request(self, scope: Any) -> bool:
        """Whether it is work for the model, and not about requests under way or the operator's."""
        if scope["type"] == "websocket":
            return True
        if self._of_clients is None:
            self._of_clients = paths_of_clients(self._routes)
        return scope["method"] in ("POST", "PUT") and _path(scope) in self._of_clients


def paths_of_clients(routes: list[Any]) -> frozenset[str]:
    """Paths that take work: with POST or PUT, and without the operator's key. Those with
    parameters, as to cancel a response, are about what is under way."""
    return frozenset(
        route.path
        for route in routes
        if {"POST", "PUT"} & set(getattr(route, "methods", None) or ())
        and getattr(route.endpoint, "_auth_level", AuthLevel.NORMAL) is AuthLevel.NORMAL
        and "{" not in route.path
        and route.path not in ABOUT_OTHERS
    )


def _path(scope: Any) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def _asks_for_health(scope: Any) -> bool:
    """Whether it asks for the health of the server, by which balancers go; not for that of its
    instances (`/health?instances=1`), by which it is restarted."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    if _path(scope) not in HEALTH_PATHS:
        return False
    query: bytes = scope.get("query_string", b"")
    return parse_qs(query.decode("latin-1")).get("instances", ["0"])[-1] == "0"


async def _refuse(scope: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    why = f"The server is drained and takes no new requests. Try again in {RETRY_S} s."
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": TRY_AGAIN, "reason": why})
        return
    retry = (RETRY_HEADER, str(RETRY_S).encode())
    await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, why, [retry])
