"""A whole server is drained: what its health says, and which requests it still takes."""

import asyncio
import json

import pytest
from fastapi import FastAPI
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.routing import Route

from pascal_sglang import clock
from pascal_sglang.entrypoints import drain_routes, server_drain
from pascal_sglang.entrypoints.server_drain import (
    NOTICE_S,
    ServerDrain,
    ServerDrainMiddleware,
    paths_of_clients,
)


@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def flush_cache():
    return "flushed"


class Scene:
    """now: what the clock says. ends: whether SGLang was told to end. refused: how many were."""

    def __init__(self, monkeypatch):
        self.now, self.ends, self.refused = 100.0, False, 0
        monkeypatch.setattr(clock, "now", lambda: self.now)
        self.drain = ServerDrain(lambda: self.ends, self._count)
        self.app = FastAPI()
        self.reached = []
        self.goes_on = asyncio.Event()
        for path in ("/generate", "/v1/chat/completions"):
            self.app.post(path)(self._work)
        self.app.post("/v1/responses/{response_id}/cancel")(self._work)
        self.app.post("/close_session")(self._work)
        self.app.get("/health")(self._work)
        self.app.get("/ready")(self._work)
        self.app.get("/metrics")(self._work)
        self.app.post("/flush_cache")(flush_cache)
        drain_routes.add_routes(self.app, [], 1, self.drain)
        self.whole = ServerDrainMiddleware(self.app, self.drain, self.app.router.routes)

    def _count(self):
        self.refused += 1

    async def _work(self):
        self.reached.append(1)
        await self.goes_on.wait()
        return "done"

    async def ask(self, method, path, body=b"", kind="http"):
        """Status, headers and body of the reply; for a WebSocket, what it is told."""
        path, _, query = path.partition("?")
        sent = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        about = {"path": path, "query_string": query.encode(), "headers": [], "root_path": ""}
        scope = {"type": kind, "method": method, "http_version": "1.1", **about}
        await self.whole(scope, receive, send)
        if kind == "websocket":
            return sent
        data = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], dict(sent[0]["headers"]), data

    def run(self, method, path, body=b"", kind="http"):
        async def one():
            self.goes_on.set()
            return await self.ask(method, path, body, kind)

        return asyncio.run(one())

    def status(self, method, path, body=b""):
        return self.run(method, path, body)[0]

    def post(self, path, **body):
        code, _, data = self.run("POST", path, json.dumps(body).encode())
        return code, json.loads(data)


@pytest.fixture
def scene(monkeypatch):
    return Scene(monkeypatch)


def test_health_says_so_at_once_and_requests_are_refused_after_the_notice(scene):
    assert scene.status("GET", "/health") == scene.status("POST", "/generate") == 200
    assert scene.post("/pascal/drain") == (
        200,
        {"state": "draining", "left": 0, "refuses": False, "seconds": 0.0},
    )
    for path in ("/health", "/ready"):
        assert scene.status("GET", path) == 503
    assert scene.status("POST", "/generate") == 200, "whoever watches the health has not seen it"
    scene.now += NOTICE_S
    code, headers, data = scene.run("POST", "/generate")
    assert (code, headers[b"retry-after"]) == (503, b"1")
    error = json.loads(data)["error"]
    assert (error["code"], error["type"]) == (503, "ServiceUnavailable")
    assert error["message"].startswith("The server is drained")
    assert scene.refused == 1
    assert scene.post("/pascal/drain")[1]["state"] == "drained"
    assert scene.post("/pascal/undrain")[1] == {
        "state": "serving",
        "left": 0,
        "refuses": False,
        "seconds": 0.0,
    }
    assert scene.status("GET", "/health") == scene.status("POST", "/generate") == 200


def test_what_is_under_way_ends_and_only_then_the_server_is_drained(scene):
    async def run():
        under_way = asyncio.create_task(scene.ask("POST", "/v1/chat/completions"))
        while not scene.reached:
            await asyncio.sleep(0)
        scene.drain.begin(0)
        refused = await scene.ask("POST", "/v1/chat/completions")
        before = scene.drain.describe()
        scene.goes_on.set()
        return await under_way, refused, before

    done, refused, before = asyncio.run(run())
    assert (done[0], refused[0]) == (200, 503)
    assert (before["state"], before["left"], before["refuses"]) == ("draining", 1, True)
    assert scene.drain.describe()["state"] == "drained"


def test_one_that_breaks_off_is_not_left(scene):
    async def broken(*_):
        raise ConnectionError

    scene.whole.app = broken
    with pytest.raises(ConnectionError):
        scene.run("POST", "/generate")
    assert scene.drain.left == 0


def test_the_operator_and_requests_under_way_are_served_while_it_is_drained(scene):
    scene.drain.begin(0)
    for path in ("/flush_cache", "/close_session", "/v1/responses/a/cancel", "/pascal/drain"):
        assert (path, scene.status("POST", path)) == (path, 200)
    for path in ("/metrics", "/health?instances=1"):
        assert (path, scene.status("GET", path)) == (path, 200)
    assert scene.status("GET", "/health?instances=0") == 503
    assert scene.refused == 0


def test_a_websocket_is_told_to_try_again_later(scene):
    scene.drain.begin(0)
    (message,) = scene.run("GET", "/v1/realtime", kind="websocket")
    assert (message["type"], message["code"]) == ("websocket.close", server_drain.TRY_AGAIN)


def test_of_several_notices_the_one_that_ends_first_holds(scene):
    scene.drain.begin(10)
    scene.now += 4
    scene.drain.begin()
    scene.drain.begin(60)
    assert not scene.drain.refuses()
    scene.drain.begin(1)
    scene.now += 1
    assert scene.drain.refuses()
    assert scene.drain.describe()["seconds"] == 5.0


def test_a_server_that_was_told_to_end_is_drained_and_stays_so(scene):
    scene.ends = True
    assert scene.status("GET", "/health") == 503
    scene.now += NOTICE_S
    assert scene.status("POST", "/generate") == 503
    assert scene.post("/pascal/undrain")[0] == 409
    assert scene.status("POST", "/generate") == 503


def test_a_notice_is_for_a_drain_and_an_instance_needs_another_one(scene):
    assert scene.post("/pascal/undrain", notice_s=1)[0] == 400
    code, told = scene.post("/pascal/drain", dp_rank=0)
    assert (code, "one instance" in told["detail"]) == (409, True)
    assert not scene.drain.is_on()


def test_all_of_sglangs_ways_in_for_work_are_known():
    """And none of the operator's. A release that adds one is looked at here."""
    from sglang.srt.entrypoints import http_server

    found = paths_of_clients(http_server.app.router.routes)
    for path in (
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/v1/embeddings", "/v1/score", "/v1/rerank", "/invocations", "/vertex_generate"),
        *("/api/chat", "/api/generate", "/classify", "/open_session"),
    ):
        assert path in found
    for path in (
        "/abort_request",
        "/pause_generation",
        "/flush_cache",
        "/update_weights_from_disk",
    ):
        assert path not in found
    ways_in = {
        route.path
        for route in http_server.app.router.routes
        if isinstance(route, Route) and {"POST", "PUT"} & set(route.methods or ())
    }
    operators = {
        route.path
        for route in http_server.app.router.routes
        if getattr(getattr(route, "endpoint", None), "_auth_level", None)
        not in (None, AuthLevel.NORMAL)
    }
    about_others = {"/close_session", "/v1/responses/{response_id}/cancel"}
    assert ways_in - operators - found == about_others
