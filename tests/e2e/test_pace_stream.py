"""Paced streams on the real server: the same tokens, no faster than the reader."""

import itertools
import json
import time
import urllib.request

import pytest

from tests.harness import PASCAL, TINY_FLAGS, Server
from tests.requests import chat, generate

TPOT = 0.04
THINK, TOTAL = 20, 60
ANSWER = TOTAL - THINK - 1


@pytest.fixture(scope="module")
def paced_server(tiny_model):
    flags = ["--pascal-pace-stream", "--pascal-answer-tpot-ms", str(1000 * TPOT)]
    with Server(PASCAL, ["--model-path", str(tiny_model), *TINY_FLAGS, *flags]) as server:
        yield server


def timed(server, path, body):
    """(seconds, event) of a stream as they arrive."""
    request = urllib.request.Request(
        f"{server.base_url}{path}",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    seen = []
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            text = line.decode().strip()
            if text.startswith("data: ") and text != "data: [DONE]":
                seen.append((time.monotonic(), json.loads(text[6:])))
    return seen


def no_faster_than(answer, tpot):
    """Each event's first answering token comes no earlier than all before it can have been read."""
    (start, first), (end, last) = answer[0], answer[-1]
    whole = (tokens(last) - tokens(first)) * tpot
    # The last event may bring several tokens at the time of its first.
    burst = tokens(last) - tokens(answer[-2][1]) if len(answer) > 1 else 0
    assert end - start >= 0.9 * (whole - burst * tpot)
    return end - start


def tokens(event):
    return event["meta_info"]["completion_tokens"]


def test_the_answer_is_paced_and_nothing_else_changes(paced_server):
    body = generate("How far?", THINK, TOTAL)
    whole = paced_server.post("/generate", body)
    began = time.monotonic()
    events = timed(paced_server, "/generate", body)
    assert events[-1][1]["output_ids"] == whole["output_ids"]
    assert events[-1][1]["text"] == whole["text"]
    assert events[-1][1]["meta_info"]["finish_reason"]["type"] == "length"
    counts = [tokens(e) for _, e in events]
    assert counts == sorted(counts)
    answer = [(at, e) for at, e in events if tokens(e) > THINK + 1]
    took = no_faster_than(answer, TPOT)
    thinking = [at for at, e in events if tokens(e) <= THINK]
    assert thinking, "thinking is streamed as well"
    assert answer[0][0] - began < took, "thinking is not paced"


def test_a_reply_that_is_not_streamed_is_not_held_back(paced_server):
    slow = {"pascal": {"answer_tpot_ms": 60_000}}
    body = generate("Now?", None, 30, rid="whole")
    body["sampling_params"]["custom_params"] = slow
    assert len(paced_server.post("/generate", body, timeout=60)["output_ids"]) == 30


def test_a_request_brings_its_own_pace(paced_server):
    quick, slow = (generate("Pace?", THINK, TOTAL, rid=f"pace-{ms}") for ms in (1, 100))
    quick["sampling_params"]["custom_params"]["pascal"] = {"answer_tpot_ms": 1}
    slow["sampling_params"]["custom_params"]["pascal"] = {"answer_tpot_ms": 100}
    times = []
    for body in (quick, slow):
        events = timed(paced_server, "/generate", body)
        answer = [(at, e) for at, e in events if tokens(e) > THINK + 1]
        times.append(answer[-1][0] - answer[0][0])
    assert times[1] >= 0.9 * 0.1 * (ANSWER - 8) > times[0]


def test_chat_and_several_answers_at_once(paced_server):
    events = timed(paced_server, "/v1/chat/completions", chat("Hello", THINK, TOTAL, n=2))
    for index in (0, 1):
        deltas = [(at, c["delta"]) for at, e in events for c in e["choices"] if c["index"] == index]
        content = [at for at, d in deltas if d.get("content")]
        assert any(d.get("reasoning_content") for _, d in deltas)
        assert content[-1] - content[0] >= 0.5 * TPOT * ANSWER
        assert all(a <= b for a, b in itertools.pairwise(content))


def test_a_client_that_leaves_ends_its_request(paced_server):
    body = generate("Gone", None, 4000, rid="gone", stream=True)
    request = urllib.request.Request(
        f"{paced_server.base_url}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.readline()
    assert paced_server.recent("gone")["outcome"] == "aborted"
    (instance,) = paced_server.instances()
    assert instance["requests"] == []
