"""Speculative decoding over HTTP: two instances with an EAGLE head, pauses and migrations at
random, and a drain. Every token is that of a server without any of it."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from pascal_sglang.demo.eagle import eagle_head
from tests.engine.conftest import MORE
from tests.engine.test_migration import at_rest, nothing_left, with_a_drain
from tests.requests import generate

REQUESTS = 60
SETTINGS = {"chaos": 0.03, "quantum_tokens": 50}
# Logit processors do not act on drafts, so that thinking would not end when a test says so.
FLAGS = (
    "--max-total-tokens 1500 --speculative-algorithm EAGLE --speculative-num-steps 3 "
    "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
).split()


def bodies():
    """Some streamed, some with a shared beginning, some that a stop string ends."""
    for i in range(REQUESTS):
        prompt = "a shared beginning of some length " * (i % 4) + f"Q{i}"
        body = generate(prompt, None, 60 + 3 * (i % 20), rid=f"{i}-{uuid.uuid4().hex}")
        if i % 5 == 2:
            body["sampling_params"]["stop"] = ["abcdefghijklm"[i % 13]]
        yield body, bool(i % 2)


def send(server):
    def one(job):
        body, streamed = job
        if not streamed:
            reply = server.post("/generate", body, timeout=300)
        else:
            seen, events = [], server.stream("/generate", body, timeout=300)
            for event in events:
                assert event["output_ids"][: len(seen)] == seen, "a stream took back a token"
                seen = event["output_ids"]
            reply = events[-1]
        return reply["output_ids"], reply["meta_info"]["finish_reason"]["type"], reply["text"]

    with ThreadPoolExecutor(24) as pool:
        return list(pool.map(one, bodies()))


@pytest.mark.parametrize("instances", [2, pytest.param(1, marks=MORE)])
def test_drafts_pauses_and_migrations_change_no_token(
    instances, serve, stock_server, tiny_model, tmp_path
):
    head = eagle_head(tiny_model, tmp_path / "head")
    reference = send(stock_server)
    flags, settings = [*FLAGS, "--speculative-draft-model-path", str(head)], SETTINGS
    if instances > 1:
        flags, settings = [*flags, "--dp-size", "2"], {**SETTINGS, "force_migration": 0.02}
    with serve(settings, flags) as server:
        found = with_a_drain(server, lambda: send(server)) if instances > 1 else send(server)
        seen = at_rest(server)
    assert [i for i, (a, b) in enumerate(zip(found, reference, strict=True)) if a != b] == []
    nothing_left(seen)
    for tier in ("resident", "host", "recompute"):
        assert sum(instance["pauses"].get(tier, 0) for instance in seen) > 5
    if instances > 1:
        assert sum(instance["migrations"]["incoming"].get("taken", 0) for instance in seen) > 5
