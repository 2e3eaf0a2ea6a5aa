"""Overload on the real engine: thinking budgets under backlog and by effort, and refusals."""

import json
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pascal_sglang.cluster.forecast_files import BACKLOG_SHARE
from pascal_sglang.demo.tiny import END_THINK_ID, LETTER_IDS
from pascal_sglang.entrypoints.answer_eta import LEAST_BUDGET, RETRY_S
from tests.engine.inproc.conftest import since
from tests.engine.load import abort, settled
from tests.engine.test_forecasts import ETA, ours, range_of, send
from tests.requests import chat, generate

BUDGET = "x-pascal-thinking-budget"
FLAGS = "--enable-strict-thinking --max-running-requests 4 --served-model-name tiny".split()
# Memory for as many as run, and a quantum that none of them comes to the end of: whoever comes
# waits for all who are there.
FLAGS += ["--max-total-tokens", "32768"]
QUANTUM = 10_000
EFFORTS = {"low": 12, "high": 40}
EFFORT_BUDGETS = ",".join(f"{name}={tokens}" for name, tokens in EFFORTS.items())
# As the server starts.
LIMITS = {
    "brownout": "off",
    "max_ttfo": None,
    "fairness": "off",
    "effort_budgets": EFFORT_BUDGETS,
}


@pytest.fixture(scope="module")
def overloaded(serve):
    with serve({"effort_budgets": EFFORT_BUDGETS, "quantum_tokens": QUANTUM}, FLAGS) as server:
        yield server


@pytest.fixture
def server(overloaded):
    """Has learnt that thoughts end with their first token, whatever long ones were here before."""
    teach(overloaded)
    yield overloaded
    overloaded.put("/pascal/config", LIMITS)


def teach(server):
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(16) as pool:
        while not (longest := learnt(server)) or longest > LEAST_BUDGET:
            assert time.monotonic() < deadline, server.instances()
            list(pool.map(lambda _: send(server, ends_at_once()), range(64)))
    while not ((seen := goes_by(server)) and seen["idle"]):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)


def goes_by(server):
    """What requests are decided by, None at first: a moment after the instance has forecast it."""
    return server.get("/pascal/status")["admission"]["forecasts"].get("0")


def learnt(server):
    """What nine of ten thoughts do not exceed: the budgets here are of three of four."""
    (instance,) = server.instances()
    return (instance["forecast"] or {}).get("thinking_tokens", {}).get("p90")


def ends_at_once():
    body = unlimited(4)
    body["sampling_params"]["logit_bias"] = {str(END_THINK_ID): 100.0}
    return body


def unlimited(total, **more):
    """A request that thinks for as long as it may, and brings no budget."""
    return {**generate("Hm", None, total, **more), "require_reasoning": True}


@contextmanager
def backlog(server):
    """More requests than slots, until they are aborted; a new one would mostly wait."""
    with ThreadPoolExecutor(16) as pool:
        bodies = [
            generate(f"Q{i}", 6000, 6010, rid=f"filling-{uuid.uuid4().hex}") for i in range(16)
        ]
        jobs = [pool.submit(server.post, "/generate", body, 300) for body in bodies]

        try:
            deadline = time.monotonic() + 60
            while True:
                (instance,) = server.instances()
                seen = goes_by(server)
                # All have come: an abort reaches each.
                have_come = len(instance["requests"]) >= len(bodies)
                if have_come and seen and seen["backlog_share"] > 2 * BACKLOG_SHARE:
                    break
                assert time.monotonic() < deadline, (len(instance["requests"]), seen)
                time.sleep(0.1)
            yield
        finally:
            for body in bodies:
                abort(server, body["rid"])
            for job in jobs:
                job.result()


def answered(server, body):
    """The reply, or the refusal."""
    try:
        return send(server, body)
    except urllib.error.HTTPError as error:
        return error


def refusal(server, body, path="/generate"):
    try:
        reply = send(server, body, path)
    except urllib.error.HTTPError as error:
        return error, json.loads(error.read())
    pytest.fail(f"{path} was not refused: {reply.headers} {reply.text:.999} {server.instances()}")


def begun(server, body):
    """A stream of `/generate`, which begins while its request still waits."""
    data = json.dumps({**body, "stream": True}).encode()
    asked = urllib.request.Request(
        f"{server.base_url}/generate", data, {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(asked, timeout=120)


def all_ended(reply):
    """What the last event of each request of a stream says."""
    with reply:
        events = [json.loads(line[6:]) for line in reply if line.startswith(b"data: {")]
    last = {event.get("index", 0): event["meta_info"] for event in events}
    return [last[index] for index in sorted(last)]


def ended(reply):
    """Of a stream of one request."""
    (meta,) = all_ended(reply)
    return meta


def counted(server, what, why):
    return server.get("/pascal/status")["admission"][what].get(why, 0)


def test_an_effort_is_a_thinking_budget_where_the_operator_says_so(server):
    def ask(effort, **more):
        rid = f"effort-{uuid.uuid4().hex}"
        body = {**chat("Hm", None, 60, rid=rid, **more), "reasoning_effort": effort}
        del body["chat_template_kwargs"]
        reply = send(server, body, "/v1/chat/completions")
        return reply.headers.get(BUDGET), server.recent(rid)["reasoning_tokens"]

    for effort, tokens in EFFORTS.items():
        assert ask(effort) == (f"{tokens};effort", tokens + 1), "the end of thinking is one more"
    assert ask("medium") == (None, 60), "SGLang's alone, which the tiny model does not follow"
    assert ask("low", custom_params={"thinking_budget": 5}) == (None, 6), "it brings its own"
    before = counted(server, "capped", "effort")
    server.put("/pascal/config", {"effort_budgets": "low=7"})
    assert ask("low") == ("7;effort", 8)
    assert ask("high") == (None, 60)
    server.put("/pascal/config", {"effort_budgets": None})
    assert ask("low") == (None, 60)
    assert counted(server, "capped", "effort") == before + 1


def test_under_backlog_thinking_without_a_budget_is_capped(server):
    server.put("/pascal/config", {"brownout": "P75"})
    assert BUDGET not in send(server, unlimited(20)).headers, "there is no backlog"
    total = LEAST_BUDGET + 30
    bodies = {
        "its own": unlimited(total),
        "opted out": ours(unlimited(total), brownout=False),
        "does not think": generate("Hm", None, 10),
    }
    bodies["its own"]["sampling_params"]["custom_params"] = {"thinking_budget": 30}
    before = counted(server, "capped", "brownout")
    with backlog(server):
        replies = {"capped": begun(server, unlimited(total))}
        replies |= {name: begun(server, body) for name, body in bodies.items()}
    metas = {name: ended(reply) for name, reply in replies.items()}
    said = {name: reply.headers.get(BUDGET) for name, reply in replies.items()}
    assert said == {"capped": f"{LEAST_BUDGET};brownout", **dict.fromkeys(bodies)}
    thought = {name: meta["reasoning_tokens"] for name, meta in metas.items()}
    assert thought == {
        "capped": LEAST_BUDGET + 1,
        "its own": 31,
        "opted out": total,
        "does not think": 0,
    }
    told = {name: meta.get("pascal") for name, meta in metas.items()}
    assert told == {
        "capped": {"thinking_budget": LEAST_BUDGET, "why": "brownout"},
        **dict.fromkeys(bodies),
    }
    assert counted(server, "capped", "brownout") == before + 1
    text = server.get("/metrics")
    assert "pascal:capped_requests_total{" in text
    assert 'why="brownout"' in text


def test_of_a_batch_each_is_told_its_own_budget(server):
    server.put("/pascal/config", {"brownout": "P75"})
    sampling = unlimited(LEAST_BUDGET + 10)["sampling_params"]
    own = {**sampling, "custom_params": {"thinking_budget": 20}}
    batch = {"text": ["one", "two"], "sampling_params": [sampling, own], "require_reasoning": True}
    before = counted(server, "capped", "brownout")
    with backlog(server):
        reply = begun(server, batch)
    metas = all_ended(reply)
    assert counted(server, "capped", "brownout") == before + 1
    assert [meta["reasoning_tokens"] for meta in metas] == [LEAST_BUDGET + 1, 21]
    assert [meta.get("pascal", {}).get("thinking_budget") for meta in metas] == [LEAST_BUDGET, None]
    assert BUDGET not in reply.headers


STREAMS = {
    "/generate": {**unlimited(8), "stream": True},
    "/v1/chat/completions": {**chat("Hm", None, 8), "stream": True},
    "/v1/responses": {"model": "tiny", "input": "Hm", "max_output_tokens": 8, "stream": True},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "Hm"}]},
    "/api/generate": {"model": "tiny", "prompt": "Hm", "options": {"num_predict": 8}},
}


def test_what_would_take_too_long_is_refused_on_every_route_until_the_server_is_idle(server):
    """Then nothing would be learnt from refusals, so that nobody would ever be served again."""
    ended_before = settled(server)["ended"]
    refused, capped = counted(server, "refused", "max_ttfo"), counted(server, "capped", "brownout")
    # Below any forecast: thoughts were short here, so that a backlog seems short as well.
    limits = {"max_ttfo": 1e-6, "brownout": "P75"}
    said_before = len(server.output)
    with backlog(server):
        server.put("/pascal/config", limits)
        asked = [*STREAMS.items(), ("/generate", unlimited(8))]
        for number, (path, body) in enumerate(asked * 2):
            if number == len(asked):
                # From now on a request is decided on later, once its tenant is known.
                server.put("/pascal/config", {"fairness": "user"})
            error, said = refusal(server, body, path)
            assert error.code == said["code"] == 503, path
            assert RETRY_S[0] <= int(error.headers["retry-after"]) <= RETRY_S[1]
            assert range_of(error.headers[ETA])
            assert "later than this server's limit of 1e-06 s" in said["message"]
            assert BUDGET not in error.headers
        (instance,) = server.instances()
        assert instance["ended"] == ended_before, "none was taken, and none that has begun ended"
        assert counted(server, "refused", "max_ttfo") == refused + 2 * len(asked)
        assert counted(server, "capped", "brownout") == capped, "what is refused is not capped"
    assert "Exception in ASGI application" not in server.output[said_before:]
    deadline = time.monotonic() + 60
    # Its prefill alone takes longer than the header rounds off.
    slow = {**unlimited(8), "input_ids": [LETTER_IDS[0]] * 4000}
    del slow["text"]
    while (reply := answered(server, slow)).status == 503:
        assert time.monotonic() < deadline, "an idle server refuses"
        time.sleep(0.1)
    assert reply.status == 200
    half, _ = range_of(reply.headers[ETA])
    assert half > limits["max_ttfo"], "though its answer comes later than that"


OLLAMA_CHAT = since(
    "0.5.23", "SGLang's /api/chat takes a mapping for token ids there, and breaks off"
)


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=OLLAMA_CHAT) if p == "/api/chat" else p for p in STREAMS]
)
def test_every_stream_begins_with_its_forecast(server, path):
    assert range_of(send(server, STREAMS[path], path).headers[ETA])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"brownout": "P50"}, "brownout must be one of P75, P90, off"),
        ({"brownout": True}, "brownout must be one of P75, P90, off"),
        ({"brownout": None}, "brownout must be one of P75, P90, off"),
        ({"max_ttfo": 0}, "max_ttfo must be a number above 0"),
        ({"max_ttfo": "soon"}, "max_ttfo must be a number above 0"),
        ({"effort_budgets": "low"}, "effort_budgets must be EFFORT=TOKENS"),
        ({"effort_budgets": "low=1,low=2"}, "effort_budgets must be EFFORT=TOKENS"),
        ({"effort_budgets": 7}, "effort_budgets must be a text"),
        ({"brownout": "P75", "max_ttfo": -1}, "max_ttfo must be a number above 0"),
    ],
)
def test_a_bad_limit_is_one_clear_line_and_nothing_changes(server, body, says):
    before = server.get("/pascal/config")
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.put("/pascal/config", body)
    assert caught.value.code == 400
    assert says in json.loads(caught.value.read())["message"]
    assert server.get("/pascal/config") == before
