"""A mixed load for the tiny model, and what came back of it.

Some ask for a grammar of their own: SGLang compiles it meanwhile and queues them on its own.
"""

import json
import random
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

from pascal_sglang.demo.tiny import LETTER_IDS
from tests.requests import generate

REQUESTS = 100
LETTERS = range(LETTER_IDS[0], LETTER_IDS[1] + 1)
ABORTED = frozenset(range(5, REQUESTS, 16))
# Some of those that do not think. The last ones: SGLang does not overlap steps while one runs.
GRAMMARS = frozenset(range(84, REQUESTS, 7))


def bodies(count):
    """The first `count` requests: thinking or not, shared beginnings, grammars. A third end by a
    stop token when the model happens to write it, which the scheduler learns a step late."""
    dice = random.Random(5)
    made = []
    for i in range(count):
        prompt = (
            "a shared beginning of some length " * (i % 4) + f"Q{i} " + "x" * dice.randint(0, 60)
        )
        body = generate(
            prompt,
            think=None if i % 7 == 0 else dice.randint(3, 80),
            total=dice.randint(60, 160),
            rid=f"{i}-{uuid.uuid4().hex}",
        )
        if i % 3 == 1:
            # SGLang looks for stop tokens only where the end of a turn counts too. The model writes
            # 64 characters, each as likely as the others: one of two comes after some 32 tokens.
            body["sampling_params"].pop("ignore_eos")
            body["sampling_params"]["stop_token_ids"] = dice.sample(LETTERS, 2)
        elif i % 15 == 2:
            body["sampling_params"]["stop"] = [dice.choice("abcdefgh") + dice.choice("ijklmnop")]
        if i in GRAMMARS:
            body["sampling_params"] |= {"regex": f"[a-f]{{40,80}} {i}", "ignore_eos": False}
        made.append(body)
    return made


def run(server, count=REQUESTS):
    """Send them, some streamed, some aborted.

    Returns output ids and finish reason per request; streams are checked for gaps as they come,
    and what the aborted ones had got.
    """

    def one(job):
        i, body = job
        if i in ABORTED:
            return None
        if i % 2:
            reply = server.post("/generate", body, timeout=300)
        else:
            seen, events = [], server.stream("/generate", body, timeout=300)
            for event in events:
                assert event["output_ids"][: len(seen)] == seen, "a stream took back a token"
                seen = event["output_ids"]
            reply = events[-1]
        return reply["output_ids"], reply["meta_info"]["finish_reason"]["type"]

    def aborted(job):
        i, body = job
        if i not in ABORTED:
            return None
        with ThreadPoolExecutor(1) as caller:
            reply = caller.submit(server.post, "/generate", body, 300)
            time.sleep(random.Random(i).random())
            while not reply.done():
                abort(server, body["rid"])
                time.sleep(0.2)
            return reply.result()["output_ids"]

    jobs = list(enumerate(bodies(count)))
    with ThreadPoolExecutor(32) as pool, ThreadPoolExecutor(4) as aborters:
        cut = aborters.map(aborted, [job for job in jobs if job[0] in ABORTED])
        whole = pool.map(one, jobs)
        return list(whole), list(cut)


def abort(server, rid):
    request = urllib.request.Request(
        f"{server.base_url}/abort_request",
        json.dumps({"rid": rid}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).read()


def settled(server):
    """The instance once nothing runs, waits or is paused."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        (instance,) = server.instances()
        if not instance["requests"] and not instance["paused"]:
            return instance
        time.sleep(0.05)
    raise AssertionError(f"never came to rest: {instance}")
