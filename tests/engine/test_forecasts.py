"""Forecasts of real requests on the real engine, as clients and operators hear them."""

import json
import math
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.load import abort
from tests.requests import chat, generate

ETA = "x-pascal-answer-eta"


@pytest.fixture(scope="module")
def server(pascal_server):
    """Once it has made its first forecast."""
    pascal_server.post("/generate", generate("Hm", think=8, total=12))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        (instance,) = pascal_server.instances()
        if instance["forecast"] is not None and ETA in send(pascal_server, short()).headers:
            return pascal_server
        time.sleep(0.2)
    raise AssertionError(f"no forecast: {instance['forecast']}\n{pascal_server.output[-2000:]}")


def short():
    return generate("Hm", think=4, total=6)


def ours(body, path="/generate", **asked):
    """The same request with something asked for in `custom_params.pascal`."""
    params = body["sampling_params"] if path == "/generate" else body
    params["custom_params"] = {**params.get("custom_params", {}), "pascal": asked}
    return body


def send(server, body, path="/generate"):
    request = urllib.request.Request(
        f"{server.base_url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.text = reply.read().decode()
        return reply


def range_of(text):
    half, most = map(float, text.split(";"))
    assert 0 <= half <= most < math.inf
    return half, most


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_every_reply_says_when_its_answer_begins(server, path, streams):
    bodies = {
        n: generate("Hm", n, n + 4) if path == "/generate" else chat("Hm", n, n + 4)
        for n in (2, 200)
    }
    few, many = (
        range_of(send(server, {**body, "stream": streams}, path).headers[ETA])
        for body in bodies.values()
    )
    assert few[0] < many[0], "a budget bounds the forecast"
    assert few[1] < many[1], "and how far it may be off"


def test_without_thinking_the_first_token_answers(server):
    half, _ = range_of(send(server, generate("Hm", None, 4)).headers[ETA])
    whole, _ = range_of(
        send(server, {**generate("Hm", None, 4), "require_reasoning": True}).headers[ETA]
    )
    assert half < whole


def test_a_stream_that_asks_hears_while_it_thinks(server):
    body = {**ours(generate("Once", think=300, total=310), eta_comments=True), "stream": True}
    events = send(server, body).text.split("\n\n")
    comments = [n for n, event in enumerate(events) if event.startswith(": pascal-answer-eta ")]
    assert comments
    for n in comments:
        range_of(events[n].split()[-1])
    metas = [json.loads(e[6:])["meta_info"] for e in events if e.startswith("data: {")]
    assert metas[-1]["reasoning_tokens"] == 301
    assert metas[-1]["completion_tokens"] == 310
    assert events.index("data: [DONE]") > max(comments)
    assert ": pascal" not in send(server, {**short(), "stream": True}).text


def test_the_status_has_the_forecast_of_a_request_that_thinks(server):
    body = generate("Once", think=6000, total=6002, rid=f"test-{uuid.uuid4().hex}")
    with ThreadPoolExecutor(1) as caller:
        reply = caller.submit(send, server, body)
        found = None
        while not reply.done() and found is None:
            (instance,) = server.instances()
            live = {r["rid"]: r["answer_in_s"] for r in instance["requests"]}
            found = live.get(body["rid"])
            time.sleep(0.05)
        abort(server, body["rid"])
        reply.result()
    assert found is not None
    assert 0 <= found["p10"] <= found["p50"] <= found["p90"] < math.inf
    (instance,) = server.instances()
    forecast = instance["forecast"]
    assert forecast["errors"] == 0
    assert forecast["token_s"] > 0
    assert forecast["backlog_s"] >= 0
    assert forecast["ttfo_s"]["p50"] > 0
    assert sum(forecast["outcomes"]["arrival"].values()) > 0


def test_metrics_have_the_forecast(server):
    text = server.get("/metrics")
    for name in (
        "pascal:ttfo_forecast_seconds{",
        "pascal:backlog_seconds{",
        "pascal:forecasts_total{",
    ):
        assert name in text
    assert 'quantile="0.5"' in text


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_deadline_that_cannot_be_met_is_refused_at_once(server, path, streams):
    body = generate("Hm", 300, 310) if path == "/generate" else chat("Hm", 300, 310)
    ours(body, path, ttfo_deadline_s=0.001)
    before = server.get("/pascal/status")
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(server, {**body, "stream": streams}, path)
    assert caught.value.code == 503
    assert 1 <= int(caught.value.headers["retry-after"]) <= 300
    range_of(caught.value.headers[ETA])
    error = json.loads(caught.value.read())
    assert error["code"] == 503
    assert "ttfo_deadline_s of 0.001 s" in error["message"]
    after = server.get("/pascal/status")
    refused = [s["admission"]["refused"].get("deadline", 0) for s in (before, after)]
    assert refused[1] == refused[0] + 1
    assert after["instances"][0]["ended"] == before["instances"][0]["ended"], "it was never taken"
    ours(body, path, ttfo_deadline_s=600)
    assert send(server, {**body, "stream": streams}, path).status == 200


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"ttfo_deadline_s": 0}, "ttfo_deadline_s must be a number of seconds"),
        ({"ttfo_deadline_s": "soon"}, "ttfo_deadline_s must be a number of seconds"),
        ({"ttfo_deadline_s": 1e9}, "ttfo_deadline_s must be a number of seconds"),
        ({"eta_comments": 1}, "eta_comments must be true or false"),
        ({"brownout": "no"}, "brownout must be true or false"),
    ],
)
def test_what_may_not_be_asked_for_is_a_400(server, asked, problem):
    for path in ("/generate", "/v1/chat/completions"):
        body = generate("Hm", 4, 6) if path == "/generate" else chat("Hm", 4, 6)
        with pytest.raises(urllib.error.HTTPError) as caught:
            send(server, ours(body, path, **asked), path)
        assert caught.value.code == 400
        assert problem in caught.value.read().decode()
