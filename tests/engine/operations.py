"""A crowd of requests of which some run, some wait and some are held in every way."""

import json
import time
import urllib.error
import urllib.request
import uuid

from pascal_sglang.demo.tiny import LETTER_IDS
from tests.requests import chat, generate

CROWD = 24
TOTAL = 180
FIRST_LETTER, LETTERS = LETTER_IDS[0], LETTER_IDS[1] - LETTER_IDS[0] + 1


def prompt_of(i):
    return [FIRST_LETTER + (7 * i + 3 * k) % LETTERS for k in range(150 + i)]


def thinking_of(i):
    """Thinking tokens of request `i`; a third of them do not think."""
    return None if i % 3 == 0 else 6 + 2 * i


def name_of(i):
    return f"{i}-{uuid.uuid4().hex}"


def chat_of(i):
    return chat(f"question {i} " * 3, thinking_of(i), TOTAL, rid=name_of(i))


def body_of(i, made=()):
    """Request `i`; with the tokens in `made` as part of its prompt, its continuation."""
    think = thinking_of(i)
    body = generate("", think, TOTAL - len(made))
    del body["text"]
    if think is not None:
        body["sampling_params"]["custom_params"] = {"thinking_budget": think - len(made)}
    return {**body, "input_ids": prompt_of(i) + list(made), "rid": name_of(i)}


def call(server, path, body=None, timeout=60):
    """Status and text of a POST."""
    request = urllib.request.Request(
        f"{server.base_url}{path}",
        json.dumps(body or {}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def operate(server, path, **body):
    status, text = call(server, path, body)
    assert status == 200, (path, text)
    return text


def tokens_made(instances):
    """Tokens that each live request has, by its number."""
    return {
        int(r["rid"].partition("-")[0]): r["reasoning_tokens"] + r["answer_tokens"]
        for i in instances
        for r in i["requests"]
    }


def held(instances):
    """Requests by where they wait, those among them that wait to be prefilled again, and all that
    have begun."""
    counts = {"resident": 0, "host": 0, "again": 0}
    counts["begun"] = sum(map(bool, tokens_made(instances).values()))
    for instance in instances:
        for places in instance["queued"].values():
            for place in ("resident", "host"):
                counts[place] += places.get(place, 0)
        waiting = instance["requests"][len(instance["requests"]) - instance["waiting"] :]
        counts["again"] += sum(bool(r["reasoning_tokens"] + r["answer_tokens"]) for r in waiting)
    return counts


def pause_with_some_held(server, **least):
    """Pause in place at a moment when at least so many requests are held in each of those ways.
    The crowd makes few steps from one look to the next, so that the moment is met on a busy
    machine too."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        operate(server, "/pause_generation", mode="in_place")
        instances = server.instances()
        found = held(instances)
        if all(found[place] >= count for place, count in least.items()):
            return instances
        operate(server, "/continue_generation")
        time.sleep(0.01)
    raise AssertionError(f"never so many held: {least}, but {found}")
