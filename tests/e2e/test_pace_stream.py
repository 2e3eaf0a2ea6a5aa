"""Paced streams on the real server: the same tokens, no faster than the reader.

Bounds on time are the pace's own lower bounds, or so far apart that load cannot close the gap.
"""

import itertools
import json
import time
import urllib.error
import urllib.request

import pytest

from tests.harness import PASCAL, TINY_FLAGS, Server
from tests.requests import chat, generate

TPOT = 0.03
THINK, TOTAL = 20, 80


@pytest.fixture(scope="module")
def paced_server(tiny_model):
    flags = ["--pascal-pace-stream", "--pascal-answer-tpot-ms", str(1000 * TPOT)]
    with Server(
        PASCAL, ["--model-path", str(tiny_model), *TINY_FLAGS, *flags], warm=True
    ) as server:
        yield server


def at_pace(seconds, body):
    """The body with a reader of its own."""
    own = body["sampling_params"].setdefault("custom_params", {})
    own["pascal"] = {"answer_tpot_ms": 1000 * seconds}
    return body


def opened(server, path, body):
    request = urllib.request.Request(
        f"{server.base_url}{path}",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=100)


def timed(server, path, body):
    """(seconds since it was asked for, event) of a stream, as they arrive."""
    began, seen = time.monotonic(), []
    with opened(server, path, body) as reply:
        for line in reply:
            text = line.decode().strip()
            if text.startswith("data: ") and text != "data: [DONE]":
                seen.append((time.monotonic() - began, json.loads(text[6:])))
    return seen


def tokens(event):
    return event["meta_info"]["completion_tokens"]


def answered(event):
    return tokens(event) - event["meta_info"]["reasoning_tokens"]


def assert_at_pace(events, tpot):
    """No event arrives before everything ahead of it can have been read."""
    for (_, before), (at, _) in itertools.pairwise(events):
        assert at >= answered(before) * tpot


def assert_whole(events, whole):
    """Every event is what SGLang says at that token; the last is the whole reply."""
    for _, event in events:
        assert event["output_ids"] == whole["output_ids"][: tokens(event)]
        assert whole["text"].startswith(event["text"])
    last = events[-1][1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]


@pytest.mark.parametrize("think", [THINK, None])
def test_the_answer_is_paced_and_nothing_else_changes(paced_server, think):
    body = generate("How far?", think, TOTAL, return_logprob=True)
    whole = paced_server.post("/generate", body)
    events = timed(paced_server, "/generate", body)
    assert_whole(events, whole)
    assert_at_pace(events, TPOT)
    for _, event in events:
        assert len(event["meta_info"]["output_token_logprobs"]) == tokens(event)


def test_thinking_is_not_paced(paced_server):
    events = timed(paced_server, "/generate", at_pace(1.0, generate("Deep?", 300, 304)))
    thought = [at for at, event in events if answered(event) == 0]
    assert len(thought) > 1
    assert thought[-1] < 100, "300 s at the pace of answers"
    assert_at_pace(events, 1.0)


def test_a_reply_that_is_not_streamed_is_not_held_back(paced_server):
    body = at_pace(10, generate("Now?", None, 30))
    assert len(paced_server.post("/generate", body, timeout=100)["output_ids"]) == 30


def test_a_request_may_be_faster_than_the_server(paced_server):
    paced_server.put("/pascal/config", {"answer_tpot_ms": 1000})
    try:
        events = timed(paced_server, "/generate", at_pace(0.001, generate("Fast?", None, 100)))
    finally:
        paced_server.put("/pascal/config", {"answer_tpot_ms": 1000 * TPOT})
    assert events[-1][0] < 90, "99 s at the server's pace"


def test_more_than_the_buffer_holds_leaves_early_and_whole(paced_server):
    from pascal_sglang.streaming.pacing import BUFFER_TOKENS

    body = at_pace(10, generate("Long?", None, BUFFER_TOKENS + 200))
    whole = paced_server.post("/generate", generate("Long?", None, 400))
    seen = []
    with opened(paced_server, "/generate", body) as reply:
        for line in reply:
            if line.startswith(b"data: "):
                seen.append((0.0, json.loads(line[6:])))
                if tokens(seen[-1][1]) >= 100:
                    break
    assert seen[0][1]["output_ids"] == whole["output_ids"][:1]
    for (_, a), (_, b) in itertools.pairwise(seen):
        assert tokens(a) < tokens(b)
        assert b["output_ids"] == whole["output_ids"][: tokens(b)]


def test_chat_with_several_answers(paced_server):
    body = chat("Hello", THINK, TOTAL, n=2)
    whole = paced_server.post("/v1/chat/completions", body)["choices"]
    events = timed(paced_server, "/v1/chat/completions", body)
    choices = [(at, choice) for at, event in events for choice in event["choices"]]
    for index in (0, 1):
        mine = [(at, c["delta"]) for at, c in choices if c["index"] == index]
        thought = "".join(d.get("reasoning_content") or "" for _, d in mine)
        answer = [(at, d["content"]) for at, d in mine if d.get("content")]
        message = whole[index]["message"]
        assert thought == message["reasoning_content"]
        assert "".join(text for _, text in answer) == message["content"]
        assert answer[-1][0] >= TPOT * (len(answer) - 1)
        reasons = [c["finish_reason"] for _, c in choices if c["index"] == index]
        assert reasons[-1] == "length"


def test_no_prompt_of_a_batch_holds_back_another(paced_server):
    slow = at_pace(0.3, generate("One", None, 15))
    quick = at_pace(0.001, generate("Two", None, 15))
    body = {
        "text": [slow["text"], quick["text"]],
        "sampling_params": [slow["sampling_params"], quick["sampling_params"]],
    }
    events = timed(paced_server, "/generate", body)
    ends = [e["index"] for _, e in events if e["meta_info"]["finish_reason"]]
    assert ends == [1, 0]
    assert_at_pace([(at, e) for at, e in events if e["index"] == 0], 0.3)
    for index, wholly in enumerate((slow, quick)):
        mine = [(at, e) for at, e in events if e["index"] == index]
        assert_whole(mine, paced_server.post("/generate", wholly))


def test_an_aborted_answer_ends_without_waiting_for_its_reader(paced_server):
    body = at_pace(10, generate("Stop", None, 4000, rid="told to stop"))
    with opened(paced_server, "/generate", body) as reply:
        reply.readline()
        paced_server.post("/abort_request", {"rid": "told to stop"})
        events = [json.loads(line[6:]) for line in reply if line.startswith(b"data: {")]
    assert events[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert [tokens(e) for e in events] == sorted(tokens(e) for e in events)


def test_a_bad_request_gets_its_error(paced_server):
    too_long = "x" * 40000
    ((_, event),) = timed(paced_server, "/generate", generate(too_long, None, 5))
    assert event["error"]["code"] == 400
    with pytest.raises(urllib.error.HTTPError) as caught:
        timed(paced_server, "/v1/chat/completions", chat(too_long, 3, 5))
    assert caught.value.code == 400
    assert json.loads(caught.value.read())["message"]


@pytest.mark.parametrize("tpot", [TPOT, 10])
def test_a_client_that_leaves_ends_its_request(paced_server, tpot):
    rid = f"gone {tpot}"
    with opened(
        paced_server, "/generate", at_pace(tpot, generate("Gone", None, 4000, rid=rid))
    ) as r:
        r.readline()
    assert paced_server.recent(rid)["outcome"] == "aborted"
    (instance,) = paced_server.instances()
    assert instance["requests"] == []
    assert "never retrieved" not in paced_server.output
    assert "Traceback" not in paced_server.output
