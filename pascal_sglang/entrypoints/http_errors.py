"""An error in SGLang's form of one, as the whole reply to a request."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

RETRY_HEADER = b"retry-after"


async def send_error(
    send: Send, status: HTTPStatus, why: str, headers: Iterable[Header] = ()
) -> None:
    """Send it. why: for the client, one line."""
    error = {
        "object": "error",
        "message": why,
        "type": "".join(word.capitalize() for word in status.phrase.split()),
        "param": None,
        "code": status.value,
    }
    body = json.dumps({**error, "error": error}).encode()
    about = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    start = {"type": "http.response.start", "status": status.value}
    await send({**start, "headers": [*headers, *about]})
    await send({"type": "http.response.body", "body": body})
