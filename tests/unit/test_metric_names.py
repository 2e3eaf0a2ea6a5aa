"""Series keep the colon in their names, whichever Prometheus scrapes."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Counter, make_asgi_app

from pascal_sglang.entrypoints.metric_names import MetricNames, with_names_kept
from tests.scrapers import ACCEPTS

NEWEST = ACCEPTS["Prometheus 3"]


def answered(app, accept, path="/metrics"):
    """Content type and body of one GET."""
    headers = [] if accept is None else [(b"accept", accept.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    sent = []

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, body = sent
    named = {name.lower(): value for name, value in start["headers"]}
    return named[b"content-type"].decode(), body["body"].decode()


@pytest.fixture
def served():
    registry = CollectorRegistry()
    Counter("pascal:pauses", "Pauses.", ["class"], registry=registry).labels("thinking").inc()
    return make_asgi_app(registry=registry)


@pytest.mark.parametrize("accept", [*ACCEPTS.values(), None, "*/*", "text/plain"])
def test_names_are_whole_for_every_scraper(served, accept):
    content_type, body = answered(MetricNames(served), accept)
    assert 'pascal:pauses_total{class="thinking"} 1.0' in body
    assert "pascal_" not in body
    if accept == NEWEST:
        assert content_type.startswith("application/openmetrics-text")
    else:
        assert content_type.startswith("text/plain")


def test_without_us_the_library_breaks_them(served):
    """Once it does not, this file and what it tests can go."""
    _, body = answered(served, ACCEPTS["Prometheus 2.42"])
    assert "pascal_pauses_total" in body


def test_other_paths_are_left_alone():
    async def app(scope, receive, send):
        await send({"headers": [(b"content-type", b"text/plain")]})
        await send({"body": dict(scope["headers"])[b"accept"]})

    accept = ACCEPTS["Prometheus 2.42"]
    assert answered(MetricNames(app), accept, "/v1/models")[1] == accept
    assert answered(MetricNames(app), accept)[1] == with_names_kept(accept.encode()).decode()
