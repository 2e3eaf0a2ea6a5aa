"""Phases and times of real requests on the real engine, as `GET /pascal/status` tells them."""

import json
import threading
import time
import urllib.error
import urllib.request
import uuid

import pytest

from tests.requests import chat, generate


def rid():
    return f"test-{uuid.uuid4().hex}"


@pytest.mark.parametrize("streamed", [False, True])
def test_generate_with_reasoning(pascal_server, streamed):
    body = generate("Once", think=12, total=30, rid=rid())
    if streamed:
        meta = pascal_server.stream("/generate", body)[-1]["meta_info"]
    else:
        meta = pascal_server.post("/generate", body)["meta_info"]
    seen = pascal_server.recent(body["rid"])
    assert seen["reasoning_tokens"] == meta["reasoning_tokens"] == 13
    assert seen["answer_tokens"] == meta["completion_tokens"] - meta["reasoning_tokens"]
    assert seen["outcome"] == "answered"
    assert 0 < seen["ttft_s"] < seen["ttft_s"] + seen["reasoning_time_s"] < seen["ttfo_s"]
    assert 0 < seen["answer_tpot_s"] < 1


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_with_reasoning(pascal_server, streamed):
    body = chat("Hello", think=8, total=20, rid=rid())
    if streamed:
        deltas = [
            e["choices"][0]["delta"]
            for e in pascal_server.stream("/v1/chat/completions", body)
            if e["choices"]
        ]
        kinds = [
            "thinking" if d.get("reasoning_content") else "answer"
            for d in deltas
            if d.get("reasoning_content") or d.get("content")
        ]
        assert kinds == sorted(kinds, reverse=True)
        assert {"thinking", "answer"} == set(kinds)
    else:
        message = pascal_server.post("/v1/chat/completions", body)["choices"][0]["message"]
        assert message["reasoning_content"]
        assert message["content"]
    seen = pascal_server.recent(body["rid"])
    assert seen["reasoning_tokens"] == 9
    assert seen["reasoning_tokens"] + seen["answer_tokens"] == 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", generate("Once", think=None, total=9)),
        ("/v1/chat/completions", chat("Once", think=None, total=9)),
    ],
)
def test_without_thinking_the_first_token_answers(pascal_server, path, body):
    body = {**body, "rid": rid()}
    pascal_server.post(path, body)
    seen = pascal_server.recent(body["rid"])
    assert (seen["reasoning_tokens"], seen["answer_tokens"]) == (0, 9)
    assert seen["ttfo_s"] == seen["ttft_s"]
    assert seen["reasoning_time_s"] is None


def test_a_length_stop_inside_thinking_never_answers(pascal_server):
    body = generate("Once", think=500, total=10, rid=rid())
    pascal_server.post("/generate", body)
    seen = pascal_server.recent(body["rid"])
    assert (seen["reasoning_tokens"], seen["answer_tokens"]) == (10, 0)
    assert seen["outcome"] == "no_answer"
    assert seen["ttfo_s"] is None


def starts(instance):
    return sum(n for name, n in instance["decisions"].items() if name.startswith("start:"))


def test_parallel_samples_are_requests_of_their_own(pascal_server):
    """The prompt's own pass ahead of them is none."""
    (instance,) = pascal_server.instances()
    before, started = sum(instance["ended"].values()), starts(instance)
    body = generate("Once", think=4, total=8)
    body["sampling_params"] |= {"n": 3, "temperature": 1.0}
    assert len(pascal_server.post("/generate", body)) == 3
    (instance,) = pascal_server.instances()
    assert sum(instance["ended"].values()) == before + 3
    assert starts(instance) == started + 3


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def test_structured_output_after_thinking(pascal_server):
    body = chat("Is it so?", think=6, total=60, rid=rid(), ignore_eos=False)
    body["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": SCHEMA},
    }
    choice = pascal_server.post("/v1/chat/completions", body)["choices"][0]
    seen = pascal_server.recent(body["rid"])
    assert seen["reasoning_tokens"] == 7
    assert seen["answer_tokens"] > 0
    if choice["finish_reason"] == "stop":
        assert set(json.loads(choice["message"]["content"])) == {"ok"}


def test_a_grammar_that_was_compiled_meanwhile_leaves_nobody_in_line(pascal_server):
    """SGLang queues such a request inside its own prefill step."""
    fresh = {**SCHEMA, "title": uuid.uuid4().hex}
    body = generate("Is it so?", think=None, total=40)
    body["sampling_params"] |= {"json_schema": json.dumps(fresh), "ignore_eos": False}
    for event in pascal_server.stream("/generate", body):
        assert event["meta_info"]["completion_tokens"] > 0
    (instance,) = pascal_server.instances()
    assert (instance["queued"], instance["waiting"], instance["queue_errors"]) == ({}, 0, 0)


def pace(body, ms, chats):
    params = body if chats else body["sampling_params"]
    params["custom_params"] = {**params.get("custom_params", {}), "pascal": {"answer_tpot_ms": ms}}
    return body


@pytest.mark.parametrize("streamed", [False, True])
def test_a_pace_nobody_reads_at_is_refused_on_every_route(pascal_server, streamed):
    alone, batch = generate("Hm", None, 4), generate("Hm", None, 4)
    batch |= {"text": ["Hm", "Hm"], "sampling_params": [alone["sampling_params"], {}]}
    completion = {"model": "tiny", "prompt": "Hm", "max_tokens": 4}
    for ms in (0.001, 1e308, "fast"):
        pace(alone, ms, chats=False)  # The batch's first prompt shares its parameters.
        for path, body in (
            ("/generate", alone),
            ("/generate", batch),
            ("/v1/chat/completions", pace(chat("Hm", None, 4), ms, chats=True)),
            ("/v1/completions", pace(dict(completion), ms, chats=True)),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                pascal_server.post(path, {**body, "stream": streamed})
            assert caught.value.code == 400
            assert "from 1 to 10000" in caught.value.read().decode()
    assert len(pascal_server.post("/generate", pace(alone, 10_000, chats=False))["output_ids"]) == 4


def test_tool_call_after_thinking(pascal_server):
    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": SCHEMA},
    }
    body = chat("Look it up", think=6, total=60, rid=rid(), tools=[tool], tool_choice="required")
    pascal_server.post("/v1/chat/completions", {**body, "ignore_eos": False})
    seen = pascal_server.recent(body["rid"])
    assert seen["reasoning_tokens"] == 7
    assert seen["answer_tokens"] > 0


@pytest.mark.parametrize(("think", "last"), [(6000, "reasoning"), (4, "answering")])
def test_live_requests_show_their_phase_and_an_abort_ends_them(pascal_server, think, last):
    body = generate("Long", think, 6010, rid=rid())
    caller = threading.Thread(target=pascal_server.post, args=("/generate", body))
    caller.start()
    phases = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and last not in phases:
        live = {r["rid"]: r for i in pascal_server.instances() for r in i["requests"]}
        if body["rid"] in live:
            phases.append(live[body["rid"]]["phase"])
        time.sleep(0.05)
    assert phases == sorted(phases, reverse=True)
    assert phases[-1] == last
    request = urllib.request.Request(
        f"{pascal_server.base_url}/abort_request",
        json.dumps({"rid": body["rid"]}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).read()
    caller.join(60)
    assert not caller.is_alive()
    assert pascal_server.recent(body["rid"])["outcome"] == "aborted"


def test_metrics_carry_the_series(pascal_server):
    def value(name, **labels):
        total = 0.0
        for line in pascal_server.get("/metrics").splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    names = ["ttft_seconds", "reasoning_seconds", "ttfo_seconds", "answer_tpot_seconds"]
    names.append("answer_qoe")
    before = {n: value(f"pascal:{n}_count") for n in names}
    answered = value("pascal:requests_total", outcome="answered")
    tokens = value("pascal:reasoning_tokens_total"), value("pascal:answer_tokens_total")
    body = generate("Once", think=10, total=20, rid=rid())
    pascal_server.stream("/generate", body)
    pascal_server.recent(body["rid"])
    assert {n: value(f"pascal:{n}_count") - c for n, c in before.items()} == dict.fromkeys(
        names, 1.0
    )
    assert value("pascal:requests_total", outcome="answered") == answered + 1
    thought = value("pascal:reasoning_tokens_total") - tokens[0]
    assert thought == 11
    assert value("pascal:answer_tokens_total") - tokens[1] == 20 - thought
    # A program reads what is not streamed, and has no pace to be kept.
    whole = {**body, "rid": rid()}
    pascal_server.post("/generate", whole)
    pascal_server.recent(whole["rid"])
    assert value("pascal:requests_total", outcome="answered") == answered + 2
    assert value("pascal:answer_qoe_count") == before["answer_qoe"] + 1


def test_the_level_is_said_at_start_in_the_status_and_as_a_metric(pascal_server):
    expected = {"level": "pause", "lowered_by": ["one instance"]}
    status = pascal_server.get("/pascal/status")
    assert status["support"] == expected
    assert [instance["support"] for instance in status["instances"]] == [expected]
    (series,) = [
        line
        for line in pascal_server.get("/metrics").splitlines()
        if line.startswith("pascal:support_level{")
    ]
    assert 'reason="one instance"' in series
    assert series.endswith(" 3.0")
    lines = pascal_server.output.splitlines()
    assert [line for line in lines if line.startswith("pascal_sglang: level")] == [
        "pascal_sglang: level pause (one instance) by the arguments",
        "pascal_sglang: level pause (one instance)",
    ]


def test_health_checks_are_not_requests(pascal_server):
    def counted():
        (instance,) = pascal_server.instances()
        waits = [
            line
            for line in pascal_server.get("/metrics").splitlines()
            if line.startswith(("pascal:starts_total", "pascal:wait_seconds_count"))
        ]
        return instance["ended"], instance["decisions"], waits

    before = counted()
    pascal_server.get("/health_generate")
    time.sleep(0.5)
    assert counted() == before


def test_an_idle_instance_rests_and_holds_no_memory(pascal_server):
    time.sleep(1)
    processes = pascal_server.tree()
    for process in processes:
        process.cpu_percent()
    time.sleep(4)
    busy = {p.name(): p.cpu_percent() for p in processes}
    assert sum(busy.values()) < 25, busy
    (instance,) = pascal_server.instances()
    kv = instance["kv_tokens"]
    assert kv["free"] + kv["evictable"] == kv["capacity"]
    assert instance["requests"] == []
