"""Random pauses of running requests change no token, lose none, and leave nothing behind."""

import json
import random
import sys
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.harness import TINY_FLAGS, Server
from tests.requests import generate

SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
REQUESTS = 160
ABORTED = frozenset(range(5, REQUESTS, 16))
CHAOS = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]


def bodies():
    dice = random.Random(5)
    made = []
    for i in range(REQUESTS):
        prompt = (
            "a shared beginning of some length " * (i % 4) + f"Q{i} " + "x" * dice.randint(0, 60)
        )
        body = generate(
            prompt,
            think=None if i % 7 == 0 else dice.randint(3, 80),
            total=dice.randint(60, 160),
            rid=f"{i}-{uuid.uuid4().hex}",
        )
        if i % 5 == 1:
            body["sampling_params"]["stop"] = [dice.choice("abcdefgh") + dice.choice("ijklmnop")]
        made.append(body)
    return made


def run(server):
    """Output ids and finish reason per request; streams are checked for gaps as they come."""

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

    jobs = list(enumerate(bodies()))
    with ThreadPoolExecutor(32) as pool, ThreadPoolExecutor(4) as aborters:
        cut = list(aborters.map(aborted, [job for job in jobs if job[0] in ABORTED]))
        whole = list(pool.map(one, jobs))
    return whole, cut


def abort(server, rid):
    request = urllib.request.Request(
        f"{server.base_url}/abort_request",
        json.dumps({"rid": rid}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).read()


@pytest.fixture(scope="module")
def reference(stock_server):
    """What stock SGLang answers, with memory to spare."""
    return run(stock_server)[0]


ARMS = {
    "overlap": ([], {}),
    "no overlap": (["--disable-overlap-schedule"], {}),
    "two ranks": (["--tp-size", "2"], {}),
    "recompute": ([], {"host_kv_gb": 0.0}),
    "paper": ([], {"policy": "paper"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_chaos_is_invisible(arm, tiny_model, reference):
    flags, settings = ARMS[arm]
    env = {
        CONFIG_ENV: PascalConfig(**{**CHAOS, **settings}).to_json(),
        "SGLANG_PLATFORM": "pascal_cpu",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, *TIGHT, *flags]
    with Server(SERVE, flags, env) as server:
        whole, _ = run(server)
        assert [i for i, (a, b) in enumerate(zip(whole, reference, strict=True)) if a != b] == []
        instance = settled(server)
        assert instance["policy_errors"] == 0
        assert sum(instance["ended"].values()) >= REQUESTS
        rung = "recompute" if arm == "recompute" else "host"
        assert instance["pauses"][rung] > 100
        assert f'rung="{rung}"' in server.get("/metrics")
        kv = instance["kv_tokens"]
        assert kv["free"] + kv["evictable"] == kv["capacity"]
        assert instance["requests"] == []


def settled(server):
    """The instance once nothing runs, waits or is paused."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        (instance,) = server.instances()
        if not instance["requests"] and not instance["paused"]:
            return instance
        time.sleep(0.2)
    raise AssertionError(f"never came to rest: {instance}")
