"""Names of series on `/metrics` that survive, whichever Prometheus asks.

SGLang's series and ours have a colon in their names. In the OpenMetrics format `prometheus_client`
writes it as `_`, unless the scraper asks for `escaping=allow-utf-8`, as Prometheus 3 does by
default. Older ones, Debian's 2.42 among them, would store `pascal_ttfo_seconds` for
`pascal:ttfo_seconds`. In the text format, which every scraper takes too, the names stay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

METRICS_PATH = "/metrics"
OPENMETRICS = "application/openmetrics-text"
NAMES_KEPT = "escaping=allow-utf-8"

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class MetricNames:
    """ASGI middleware: `/metrics` is asked for a format in which names keep their colon."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(METRICS_PATH):
            headers = [
                (name, with_names_kept(value) if name == b"accept" else value)
                for name, value in scope["headers"]
            ]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)


def with_names_kept(accept: bytes) -> bytes:
    """An `Accept` header without the formats in which names lose their colon."""
    formats = accept.decode("latin-1").split(",")
    kept = [each for each in formats if OPENMETRICS not in each or NAMES_KEPT in each]
    return ",".join(kept).encode("latin-1")
