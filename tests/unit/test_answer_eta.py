"""What clients hear of a forecast: headers, comments, refusals and budgets, in any format."""

import asyncio
import dataclasses
import json
import os
import time
from types import SimpleNamespace

import orjson
import pytest

from pascal_sglang import clock
from pascal_sglang.cluster import forecast_files
from pascal_sglang.cluster.forecast_files import ForecastFiles, file_name
from pascal_sglang.cluster.status_file import StatusFile
from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints import (
    answer_eta,
    eta_response,
    http_server,
    request_notes,
    tenants,
)
from pascal_sglang.entrypoints.answer_eta import AnswerEta, Overloaded
from pascal_sglang.entrypoints.eta_response import AnswerEtaMiddleware
from pascal_sglang.policy.outlook import ArrivalOutlook
from pascal_sglang.streaming.followed import followed

# A token every 10 ms.
ARRIVAL = ArrivalOutlook(
    times=[0.0, 100.0],
    tokens=[0.0, 10_000.0],
    lengths=[100.0, 500.0, 2000.0],
    prompt=20.0,
    prefill_token_s=0.01,
    waits_s=0.0,
    token_s=0.01,
    learnt=([(0.0, 0.0, 0.0)] * 3, 0.0, 0.0),
)
BACKLOG = dataclasses.replace(ARRIVAL, times=[5.0, 105.0], waits_s=5.0)


def show(folder, instance=0, arrival=ARRIVAL, idle=False, requests=(), by_tenant=()):
    told = {
        "pid": os.getpid(),
        "idle": idle,
        "arrival": dataclasses.asdict(arrival),
        "by_tenant": {tenant: dataclasses.asdict(each) for tenant, each in by_tenant},
        "thinking": {"P75": 800.0, "P90": 2000.0},
        "requests": dict(requests),
    }
    StatusFile(str(folder), file_name(instance)).show(0.0, lambda: told)


def asking(rid="r", **more):
    custom = {"pascal": more.pop("pascal", {})}
    if "budget" in more:
        custom["thinking_budget"] = more.pop("budget")
    fields = {"input_ids": [1] * 20, "require_reasoning": True, "stream": False, **more}
    return SimpleNamespace(rid=rid, sampling_params={"custom_params": custom}, **fields)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve one request: what `app` does with it stands for SGLang."""

    def serve(obj, states=("live",), chunks=(), late_s=0.0, method="POST", **config):
        eta = AnswerEta(PascalConfig(**config), ForecastFiles(tmp_path, lambda: list(states)), None)
        monkeypatch.setattr(answer_eta, "_active", eta)
        sent = []

        async def tokens():
            for chunk in chunks:
                await asyncio.sleep(late_s)
                yield chunk

        async def app(scope, receive, send):
            try:
                answer_eta.decide(obj)
            except Overloaded as error:
                body = orjson.dumps({"error": {"message": str(error)}})
                head = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 400, "headers": head})
                await send({"type": "http.response.body", "body": body})
                return
            kind = b"text/event-stream" if obj.stream else b"application/json"
            head = [(b"content-type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            async for chunk in followed(tokens()):
                body = b"data: " + orjson.dumps(chunk) + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": "/generate"}
        asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        body = b"".join(m.get("body", b"") for m in sent[1:]).decode()
        return SimpleNamespace(status=sent[0]["status"], headers=headers, body=body, eta=eta)

    serve.folder = tmp_path
    return serve


def thought(whole, thinking, **more):
    return {"meta_info": {"completion_tokens": whole, "reasoning_tokens": thinking, **more}}


def test_a_response_says_when_its_answer_begins(served):
    show(served.folder)
    assert served(asking()).headers["x-pascal-answer-eta"] == "5.00;20.00"


@pytest.mark.parametrize(
    ("obj", "header"),
    [
        (asking(input_ids=[1] * 120), "6.00;21.00"),
        (asking(input_ids=[[1] * 20, [1] * 120]), "6.00;21.00"),
        (asking(input_ids=None, text="x" * 480), "6.00;21.00"),
        (asking(input_ids=None, text=None), "5.00;20.00"),
        (asking(require_reasoning=False), "0.01;0.01"),
        (asking(budget=99), "1.00;1.00"),
        (asking(max_thinking_tokens=99), "1.00;1.00"),
    ],
)
def test_it_is_that_of_its_prompt_and_budget(served, obj, header):
    show(served.folder)
    assert served(obj).headers["x-pascal-answer-eta"] == header


def test_placement_goes_where_the_answer_is_first(served):
    show(served.folder, 0, BACKLOG)
    show(served.folder, 1, ARRIVAL)
    both = ("live", "live")
    eta = "x-pascal-answer-eta"
    assert served(asking(), both).headers[eta] == "5.00;20.00"
    assert served(asking(routed_dp_rank=0), both).headers[eta] == "10.00;25.00"
    assert served(asking(), both, placement="sglang").headers[eta] == "10.00;25.00"
    assert served(asking(), ("live", "dead")).headers[eta] == "10.00;25.00"
    assert served(asking(), ("live", "drained")).headers[eta] == "10.00;25.00"


def test_an_instance_that_is_drained_is_told_from_those_that_take_requests(tmp_path, monkeypatch):
    shown = {"states": ["live", "live", "dead"], "drains": {"1": {"left": 3}}}
    StatusFile(str(tmp_path)).show(0.0, lambda: shown)
    monkeypatch.setattr(http_server, "_status_files", [str(tmp_path / "controller.json")])
    assert http_server.instance_states() == ["live", "live", "dead"]
    assert http_server.states_and_drains() == ["live", "drained", "dead"]
    show(tmp_path, 1, requests={"r": [4.0, 9.0]})
    here = ForecastFiles(tmp_path, http_server.states_and_drains).shown()[1]
    assert (here.takes_requests, here.requests) == (False, {"r": [4.0, 9.0]})


def test_where_nothing_is_known_nothing_is_said(served):
    assert served(asking(), max_ttfo=0.001).headers == {"content-type": "application/json"}
    (served.folder / file_name(0)).write_text("{")
    assert "x-pascal-answer-eta" not in served(asking()).headers
    (served.folder / file_name(0)).write_text('{"idle": true, "arrival": {}}')
    assert "x-pascal-answer-eta" not in served(asking()).headers
    show(served.folder)
    assert "x-pascal-answer-eta" not in served(asking(), method="GET").headers
    assert "x-pascal-answer-eta" not in served(asking(), ("silent",)).headers


def test_an_old_forecast_says_nothing_of_a_busy_instance(served):
    for idle in (False, True):
        show(served.folder, idle=idle)
        old = time.time() - 2 * forecast_files.OLD_S
        os.utime(served.folder / file_name(0), (old, old))
        assert ("x-pascal-answer-eta" in served(asking()).headers) is idle


@pytest.mark.parametrize("streams", [False, True])
def test_too_late_is_refused_with_a_time_to_come_back(served, streams):
    show(served.folder)
    reply = served(asking(stream=streams), max_ttfo=2.0)
    assert reply.status == 503
    assert reply.headers["retry-after"] == "3"
    assert reply.headers["x-pascal-answer-eta"] == "5.00;20.00"
    assert int(reply.headers["content-length"]) == len(reply.body)
    error = json.loads(reply.body)
    assert (error["object"], error["type"], error["code"]) == ("error", "ServiceUnavailable", 503)
    assert "5.0 s, later than this server's limit of 2 s" in error["message"]
    assert error["error"]["message"] == error["message"]
    assert reply.eta.describe() == {
        "refused": {"max_ttfo": 1},
        "capped": {},
        "forecasts": {"0": {"idle": False, "backlog_share": 0.0}},
    }


def test_a_request_names_its_own_deadline(served):
    show(served.folder)
    within = served(asking(pascal={"ttfo_deadline_s": 5.5}))
    assert within.status == 200
    reply = served(asking(pascal={"ttfo_deadline_s": 0.5}), max_ttfo=60.0)
    assert reply.status == 503
    assert "the request's ttfo_deadline_s of 0.5 s" in json.loads(reply.body)["message"]
    assert reply.eta.describe()["refused"] == {"deadline": 1}
    assert served(asking(pascal={"ttfo_deadline_s": 60}), max_ttfo=2.0).status == 503


def test_a_retry_is_not_put_off_for_ever(served):
    show(served.folder, arrival=dataclasses.replace(ARRIVAL, times=[0.0, 1e7]))
    assert served(asking(), max_ttfo=1.0).headers["retry-after"] == "300"


def test_a_request_is_decided_on_once(served):
    show(served.folder)
    obj = asking()

    async def twice():
        token = answer_eta._exchange.set(answer_eta.Exchange())
        try:
            answer_eta._active.decide(obj)
            (served.folder / file_name(0)).unlink()
            show(served.folder, arrival=dataclasses.replace(ARRIVAL, times=[0.0, 1e7]))
            answer_eta._active.files._looked_at = float("-inf")
            answer_eta._active.decide(obj)
        finally:
            answer_eta._exchange.reset(token)

    served(asking(), max_ttfo=10.0)
    asyncio.run(twice())


def assert_run_down(comment, first, began):
    """A comment tells what is left of two numbers of seconds, which were true after `began`."""
    passed = time.monotonic() - began
    told = map(float, comment.split()[-1].split(";"))
    for left, at_first in zip(told, first, strict=True):
        assert max(0.0, at_first - passed) - 0.05 <= left <= at_first


def test_who_asks_for_comments_hears_while_it_thinks(served, monkeypatch):
    monkeypatch.setattr(eta_response, "COMMENT_S", 0.02)
    began = time.monotonic()
    show(served.folder, requests={"r": [3.0, 7.0]})
    thinking = [thought(n, n) for n in range(1, 6)]
    answering = [thought(n, 5) for n in range(6, 16)]
    asked = asking(stream=True, pascal={"eta_comments": True})
    reply = served(asked, chunks=[*thinking, *answering], late_s=0.03)
    events = reply.body.split("\n\n")
    comments = [n for n, event in enumerate(events) if event.startswith(": pascal-answer-eta ")]
    assert len(comments) >= 3
    assert max(comments) < len(events) - 6, "none while it answers"
    assert_run_down(events[comments[0]], (3.0, 7.0), began)
    whole = [json.loads(e[6:]) for e in events if e.startswith("data: ")]
    assert whole == [*thinking, *answering]


def test_without_a_forecast_of_its_own_the_one_at_arrival_runs_down(served, monkeypatch):
    show(served.folder)
    eta = served(asking()).eta
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now)
    exchange = answer_eta.Exchange(began=now - 2.0, request=asking())
    assert eta.seconds_left(exchange) is None
    exchange.estimate = ARRIVAL.estimate(20)
    assert eta.seconds_left(exchange) == pytest.approx((3.0, 18.0))


def test_nobody_else_gets_comments(served, monkeypatch):
    monkeypatch.setattr(eta_response, "COMMENT_S", 0.01)
    show(served.folder)
    chunks = [thought(n, n) for n in range(1, 6)]
    asked = asking(stream=True, pascal={"eta_comments": False})
    assert ": pascal" not in served(asked, chunks=chunks, late_s=0.02).body
    whole = asking(pascal={"eta_comments": True})
    assert ": pascal" not in served(whole, chunks=chunks, late_s=0.02).body


@pytest.mark.parametrize(("level", "budget"), [("P75", 800), ("P90", 2000)])
def test_under_backlog_thinking_is_capped(served, level, budget):
    show(served.folder, arrival=BACKLOG)
    obj = asking()
    reply = served(obj, chunks=[thought(1, 1)], brownout=level)
    assert obj.sampling_params["custom_params"]["thinking_budget"] == budget
    assert reply.headers["x-pascal-thinking-budget"] == f"{budget};brownout"
    told = json.loads(reply.body.removeprefix("data: "))["meta_info"]["pascal"]
    assert told == {"thinking_budget": budget, "why": "brownout"}
    assert reply.eta.describe()["capped"] == {"brownout": 1}


@pytest.mark.parametrize(
    ("obj", "level", "arrival"),
    [
        (asking(), "off", BACKLOG),
        (asking(), "P75", ARRIVAL),
        (asking(budget=5000), "P75", BACKLOG),
        (asking(max_thinking_tokens=5000), "P75", BACKLOG),
        (asking(pascal={"brownout": False}), "P75", BACKLOG),
        (asking(require_reasoning=False), "P75", BACKLOG),
    ],
)
def test_others_think_as_long_as_they_like(served, obj, level, arrival):
    show(served.folder, arrival=arrival)
    before = json.dumps(obj.sampling_params)
    reply = served(obj, chunks=[thought(1, 1)], brownout=level)
    assert json.dumps(obj.sampling_params) == before
    assert "x-pascal-thinking-budget" not in reply.headers
    assert "pascal" not in reply.body


def test_a_cap_has_a_floor(served, monkeypatch):
    show(served.folder, arrival=BACKLOG)
    monkeypatch.setattr(answer_eta, "LEAST_BUDGET", 900)
    obj = asking()
    served(obj, brownout="P75")
    assert obj.sampling_params["custom_params"]["thinking_budget"] == 900


def test_a_backlog_elsewhere_caps_nothing(served):
    show(served.folder, 0, BACKLOG)
    show(served.folder, 1, ARRIVAL)
    assert "x-pascal-thinking-budget" not in served(asking(), ("live", "live")).headers


@pytest.mark.parametrize(
    ("effort", "obj", "budget"),
    [
        ("low", asking(), 64),
        ("high", asking(), 4096),
        ("medium", asking(), None),
        (None, asking(), None),
        (0.5, asking(), None),
        ("low", asking(budget=7), 7),
        ("low", asking(require_reasoning=False), None),
    ],
)
def test_effort_is_a_budget_where_the_operator_says_so(monkeypatch, effort, obj, budget):
    config = PascalConfig(effort_budgets="low=64, high=4096")
    monkeypatch.setenv("PASCAL_SGLANG_CONFIG", config.to_json())
    request = SimpleNamespace(reasoning_effort=effort)
    adapted, processed = answer_eta.apply_effort(lambda *_: (obj, "p"), None, request, None)
    assert (adapted, processed) == (obj, "p")
    assert obj.sampling_params["custom_params"].get("thinking_budget") == budget


def test_a_budget_from_an_effort_is_said_and_not_capped(served):
    show(served.folder, arrival=BACKLOG)
    obj = asking(budget=4096)
    setattr(obj, answer_eta.EFFORT, 4096)
    reply = served(obj, brownout="P75")
    assert reply.headers["x-pascal-thinking-budget"] == "4096;effort"


def test_whole_replies_to_a_batch_come_as_a_list(served):
    """With something to say of each, and nothing of them is lost."""
    show(served.folder, arrival=BACKLOG)
    reply = [thought(9, 3), thought(7, 2)]
    capped = served(asking(), chunks=[reply], brownout="P75")
    (said,) = [orjson.loads(line[6:]) for line in capped.body.splitlines() if line]
    assert [each["meta_info"]["completion_tokens"] for each in said] == [9, 7]
    assert [each["meta_info"]["pascal"]["why"] for each in said] == ["brownout"] * 2
    commented = served(asking(pascal={"eta_comments": True}), chunks=[reply])
    assert orjson.loads(commented.body.splitlines()[0][6:]) == reply


def test_an_idle_instance_refuses_nobody_for_the_operator(served):
    """Its forecast would never change: it learns from requests that it has."""
    show(served.folder, idle=True)
    assert served(asking(), max_ttfo=1.0).status == 200
    assert served(asking(pascal={"ttfo_deadline_s": 1.0}), max_ttfo=1.0).status == 503
    show(served.folder, idle=False)
    assert served(asking(), max_ttfo=1.0).status == 503
    show(served.folder, 1, idle=True)
    assert served(asking(), ("live", "live"), max_ttfo=1.0).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_every_method_of_generate_is_decided_on(served, method):
    show(served.folder)
    assert served(asking(), max_ttfo=1.0, method=method).status == 503


def test_a_route_that_answers_no_error_is_answered_for(tmp_path, monkeypatch):
    """SGLang's routes for Ollama raise what they are told."""
    show(tmp_path)
    config = PascalConfig(max_ttfo=1.0)
    eta = AnswerEta(config, ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)

    def run(begins):
        sent = []

        async def app(scope, receive, send):
            if begins:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            answer_eta.decide(asking())

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/api/chat"}
        asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
        return [message.get("status") for message in sent]

    assert run(begins=False) == [503, None]
    with pytest.raises(Overloaded):
        run(begins=True)


def test_a_refusal_keeps_headers_of_the_reply_that_it_replaces(tmp_path, monkeypatch):
    show(tmp_path)
    eta = AnswerEta(PascalConfig(max_ttfo=1.0), ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)
    sent = []

    async def app(scope, receive, send):
        with pytest.raises(Overloaded):
            answer_eta.decide(asking())
        head = [(b"access-control-allow-origin", b"*"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 400, "headers": head})
        await send({"type": "http.response.body", "body": b"no"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate"}
    asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
    headers = [name for name, _ in sent[0]["headers"]]
    assert headers.count(b"content-length") == 1
    assert b"access-control-allow-origin" in headers


def test_parameters_that_are_no_object_are_sglangs_to_refuse(served, monkeypatch):
    """By brownout as by an effort."""
    show(served.folder, arrival=BACKLOG)
    obj = asking()
    obj.sampling_params["custom_params"] = "abc"
    assert served(obj, brownout="P75").status == 200
    assert obj.sampling_params["custom_params"] == "abc"
    config = PascalConfig(effort_budgets="low=64")
    monkeypatch.setenv("PASCAL_SGLANG_CONFIG", config.to_json())
    effort = SimpleNamespace(reasoning_effort="low")
    answer_eta.apply_effort(lambda *_: (obj, "p"), None, effort, None)
    assert obj.sampling_params["custom_params"] == "abc"


@pytest.mark.parametrize("effort", [None, 4096])
def test_what_is_refused_was_not_capped(served, effort):
    show(served.folder, arrival=BACKLOG)
    obj = asking(budget=effort)
    setattr(obj, answer_eta.EFFORT, effort)
    reply = served(obj, brownout="P75", max_ttfo=1.0)
    assert reply.status == 503
    told = reply.eta.describe()
    assert (told["refused"], told["capped"]) == ({"max_ttfo": 1}, {})
    assert "x-pascal-thinking-budget" not in reply.headers


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("streams", [False, True])
def test_of_a_batch_each_is_told_its_own_budget(served, streams, samples):
    """The second one brings a budget; the header speaks for all of them or not at all."""
    show(served.folder, arrival=BACKLOG)
    replies = [thought(1, 1) for _ in range(3 * samples)]
    chunks = [{**each, "index": n} for n, each in enumerate(replies)] if streams else [replies]

    def ask(*budgets):
        obj = asking(stream=streams, parallel_sample_num=samples)
        customs = [{} if budget is None else {"thinking_budget": budget} for budget in budgets]
        obj.sampling_params = [{"custom_params": custom} for custom in customs]
        reply = served(obj, chunks=chunks, brownout="P75")
        said = [orjson.loads(line[6:]) for line in reply.body.splitlines() if line]
        flat = said if streams else said[0]
        whose = [each["meta_info"].get("pascal", {}).get("thinking_budget") for each in flat]
        return reply, whose

    reply, whose = ask(None, 5000, None)
    assert whose == [800] * samples + [None] * samples + [800] * samples
    assert "x-pascal-thinking-budget" not in reply.headers
    assert reply.eta.describe()["capped"] == {"brownout": 2}
    reply, whose = ask(None, None, None)
    assert whose == [800] * 3 * samples
    assert reply.headers["x-pascal-thinking-budget"] == "800;brownout"


def begin_early(
    tmp_path, monkeypatch, obj, kind=b"text/event-stream", request_headers=(), **config
):
    """A route that begins its stream and says something before SGLang has parsed the request."""
    eta = AnswerEta(PascalConfig(**config), ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)
    sent = []

    async def app(scope, receive, send):
        async def body(text, more=True):
            await send({"type": "http.response.body", "body": text, "more_body": more})

        head = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await body(b"data: begun\n\n")
        if obj is None:
            await asyncio.sleep(0.2)
        else:
            await asyncio.sleep(0.01)
            try:
                answer_eta.decide(obj)
            except Overloaded:
                await body(b"data: error\n\n", more=False)
                return
        if obj is not None and obj.waits:
            await until(
                lambda: len(sent) >= (3 if request_headers and kind.startswith(b"text") else 2)
            )
        await body(b"data: token\n\n")
        await body(b"", more=False)

    async def until(holds):
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.005)
        return True

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": request_headers}
    asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
    (start,) = [m for m in sent if m["type"] == "http.response.start"]
    assert sent[0] is start
    text = b"".join(m.get("body", b"") for m in sent[1:]).decode()
    headers = {k.decode(): v.decode() for k, v in start["headers"]}
    return SimpleNamespace(status=start["status"], headers=headers, text=text, eta=eta)


@pytest.mark.parametrize("kind", [b"text/event-stream; charset=utf-8", b"application/x-ndjson"])
def test_a_stream_that_begins_too_soon_has_the_forecast_all_the_same(tmp_path, monkeypatch, kind):
    """And it goes on once the request is decided on, not with the first token."""
    show(tmp_path)
    reply = begin_early(tmp_path, monkeypatch, asking(waits=True), kind)
    assert reply.headers["x-pascal-answer-eta"] == "5.00;20.00"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.text == "data: begun\n\ndata: token\n\n"


def test_a_stream_that_begins_too_soon_is_refused_all_the_same(tmp_path, monkeypatch):
    show(tmp_path)
    reply = begin_early(tmp_path, monkeypatch, asking(waits=False), max_ttfo=2.0)
    assert reply.status == 503
    assert reply.headers["retry-after"] == "3"
    assert reply.headers["content-type"] == "application/json"
    assert json.loads(reply.text)["code"] == 503


def test_a_stream_whose_route_answers_no_error_is_refused_and_raises_nothing(tmp_path, monkeypatch):
    """As Ollama's: the refusal takes the place of the beginning while the error is on its way."""
    show(tmp_path)
    eta = AnswerEta(PascalConfig(max_ttfo=2.0), ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)
    sent = []

    async def app(scope, receive, send):
        head = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            answer_eta.decide(asking())
        finally:
            async with asyncio.timeout(10):
                while not sent:
                    await asyncio.sleep(0.005)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/chat", "headers": ()}
    asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
    assert [m.get("status") for m in sent] == [503, None]


def test_a_stream_without_a_request_is_held_for_a_moment_only(tmp_path, monkeypatch):
    monkeypatch.setattr(eta_response, "HOLD_LOOK_S", 0.001)
    show(tmp_path)
    reply = begin_early(tmp_path, monkeypatch, None, max_ttfo=2.0)
    assert (reply.status, reply.text) == (200, "data: begun\n\ndata: token\n\n")
    assert "x-pascal-answer-eta" not in reply.headers


def test_a_stream_is_held_for_a_decision_that_a_standing_loop_makes_late(tmp_path, monkeypatch):
    """Else its request ends in an error after status 200, though it is refused with 503."""
    show(tmp_path)
    eta = AnswerEta(PascalConfig(max_ttfo=2.0), ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)
    monkeypatch.setattr(eta_response, "HOLD_LOOK_S", 0.01)
    sent = []

    async def app(scope, receive, send):
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await asyncio.sleep(0)
        time.sleep(2 * eta_response.HOLD_LOOKS * eta_response.HOLD_LOOK_S)
        for _ in range(5):
            await asyncio.sleep(0)
        answer_eta.decide(asking())

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": ()}
    asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
    assert [m.get("status") for m in sent] == [503, None]


def test_no_forecast_at_arrival_is_below_a_step_whatever_was_learnt():
    """Of 0 s it would be below every limit, and a request be taken that waits behind all others."""
    learnt = ([(-3.0, -3.0, -3.0)] * 3, 0.0, 0.0)
    arrival = dataclasses.replace(ARRIVAL, lengths=[1.0, 1.0, 1.0], learnt=learnt)
    assert arrival.estimate(0).p50 >= arrival.token_s


def test_a_header_asks_for_comments_where_no_body_can(tmp_path, monkeypatch):
    show(tmp_path)
    asks = [(b"x-pascal-eta-comments", b"true")]
    began = time.monotonic()
    obj = asking(waits=True)
    reply = begin_early(tmp_path, monkeypatch, obj, request_headers=asks)
    comment = next(e for e in reply.text.split("\n\n") if e.startswith(": pascal-answer-eta "))
    assert_run_down(comment, (5.0, 20.0), began)
    assert obj.sampling_params["custom_params"]["pascal"] == {"eta_comments": True}
    said = asking(waits=False, pascal={"eta_comments": False})
    assert ": pascal" not in begin_early(tmp_path, monkeypatch, said, request_headers=asks).text
    lines = begin_early(
        tmp_path, monkeypatch, asking(waits=False), b"application/x-ndjson", request_headers=asks
    )
    assert ": pascal" not in lines.text


def test_a_header_that_is_neither_true_nor_false_is_a_400(tmp_path, monkeypatch):
    show(tmp_path)
    asks = [(b"x-pascal-eta-comments", b"yes\xff")]
    reply = begin_early(tmp_path, monkeypatch, asking(waits=False), request_headers=asks)
    assert reply.status == 400
    error = json.loads(reply.text)
    assert (error["code"], error["type"]) == (400, "BadRequest")
    assert "x-pascal-eta-comments must be true or false" in error["message"]


def test_an_error_before_the_decision_is_not_hidden_by_a_stream_that_is_held(tmp_path, monkeypatch):
    show(tmp_path)
    eta = AnswerEta(PascalConfig(), ForecastFiles(tmp_path, lambda: ["live"]), None)
    monkeypatch.setattr(answer_eta, "_active", eta)
    sent = []

    async def app(scope, receive, send):
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        raise KeyError("broken")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": ()}
    with pytest.raises(KeyError):
        asyncio.run(AnswerEtaMiddleware(app)(scope, None, send))
    assert sent == [], "so that whoever answers for errors still can"


def test_a_tenant_is_told_how_its_own_requests_fare(served, tmp_path, monkeypatch):
    """One that is ahead is refused, and capped, where others are not."""
    show(tmp_path, by_tenant=[("heavy", BACKLOG)])
    eta = AnswerEta(
        PascalConfig(max_ttfo=8.0, brownout="P75"), ForecastFiles(tmp_path, lambda: ["live"]), None
    )

    def decide(tenant, **more):
        exchange, obj = answer_eta.Exchange(), asking(**more)
        with answer_eta.taking_part(exchange):
            try:
                eta.decide(obj, tenant)
            except Overloaded:
                return "refused"
        return exchange.budgets[0]

    assert decide("light") is None
    assert decide("") is None
    assert decide("heavy") == "refused"
    eta.config = PascalConfig(brownout="P75")
    assert decide("heavy") == (800, "brownout")
    assert decide("light") is None


def test_of_a_request_that_is_refused_there_is_nothing_to_abort(tmp_path):
    """SGLang's routes end a stream by aborting its request, and read what is not set yet."""
    show(tmp_path, arrival=BACKLOG)
    eta = AnswerEta(PascalConfig(max_ttfo=1.0), ForecastFiles(tmp_path, lambda: ["live"]), None)
    obj = asking()
    with answer_eta.taking_part(answer_eta.Exchange()), pytest.raises(Overloaded):
        eta.decide(obj)
    assert ([obj.rid] if obj.is_single else obj.rid) == []


def test_with_tenants_a_request_is_decided_on_once_its_own_is_known(tmp_path, monkeypatch):
    """By the header of a gateway, or by a field of a body that is read meanwhile."""
    monkeypatch.setattr(answer_eta, "_active", SimpleNamespace(decide=lambda *of: told.append(of)))
    told = []

    async def replies():
        yield thought(1, 1)

    async def read():
        return {"user": "ann"}

    request = SimpleNamespace(headers={"x-tenant": "bob"}, json=read)

    async def whole(fairness):
        config = PascalConfig(fairness=fairness)
        stream = request_notes.noted(replies, obj, request, config)
        assert told == []
        return [each async for each in stream]

    for fairness, name in (("header:x-tenant", "bob"), ("user", "ann")):
        obj = asking()
        asyncio.run(whole(fairness))
        assert told == [(obj, tenants.digest(name))]
        told.clear()
