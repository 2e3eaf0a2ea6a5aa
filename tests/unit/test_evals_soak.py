"""What a soak finds wrong, on replies and figures made by hand, and on a server that misbehaves."""

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evals.soak import checks
from evals.soak.__main__ import table
from evals.soak.bodies import KINDS, Body, Maker, catalogue
from evals.soak.checks import Held
from evals.soak.findings import Findings
from evals.soak.load import Load
from evals.soak.operations import OPERATIONS
from evals.soak.replies import Part, Reply, check
from evals.soak.run import Task, soak


@pytest.fixture(autouse=True)
def _two_of_one_id_are_served(monkeypatch):
    """By the servers here, of which no time says whether they may."""
    monkeypatch.setattr("evals.soak.load.LATE_S", 600.0)


def body(kind="thinking", **sampling):
    maker = Maker(random.Random(1), "p")
    return maker.generate(kind, 3, 4, **sampling)


def reply(to=None, *, streamed=True):
    return Reply(to or body(), "a", streamed, 0.0)


def told(ids, finish=None, rid="a", **meta):
    meta = {"id": rid, "finish_reason": finish, "completion_tokens": len(ids), **meta}
    return json.dumps({"text": "x" * len(ids), "output_ids": ids, "meta_info": meta}).encode()


LENGTH = {"type": "length", "length": 8}


def test_a_catalogue_has_every_kind_and_depends_on_its_seed_alone():
    first, again, other = (catalogue(seed, 2, "p", list(KINDS)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {each.kind for each in first} == set(KINDS)
    assert all(each.refused or each.limits for each in first)


def test_a_reply_in_order_has_no_faults():
    whole = reply()
    whole.event(told([1, 2]))
    whole.event(told([1, 2, 3, 4, 5, 6, 7, 8], LENGTH))
    check(whole, aborted=False)
    assert whole.faults == []


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([told([1, 2]), told([1, 3, 4])], "a stream took back a token"),
        ([told([1] * 8, LENGTH), told([1] * 8, LENGTH)], "an event after the end"),
        ([told([1, 2])], "ended 0 times"),
        ([told([1, 2], LENGTH)], "ended by length at 2 of 8 tokens"),
        ([told([1, 2], {"type": "abort"})], "aborted by nobody"),
        ([told([1] * 8, LENGTH, completion_tokens=9)], "8 tokens, usage says 9"),
        ([told([1] * 8, LENGTH, rid="b")], "the reply of another request"),
        ([told([1], {"type": "stop", "matched": 1})], "stopped by token 1"),
        ([told([1], {"type": "stop", "matched": "ab"})], "stopped by 'ab'"),
        (
            [told([1] * 8, LENGTH, output_token_logprobs=[[-1.0, 2, None]] * 8)],
            "log probabilities of other tokens",
        ),
    ],
)
def test_each_fault_of_a_reply_is_seen(events, fault):
    bad = reply()
    for event in events:
        bad.event(event)
    check(bad, aborted=False)
    assert any(fault in each for each in bad.faults), bad.faults


def test_who_is_aborted_is_told_how_much_it_had():
    cut = reply()
    cut.event(told([1, 2], {"type": "abort"}, prompt_tokens=0))
    check(cut, aborted=True)
    assert cut.faults == ["aborted, and no prompt tokens in its usage"]


def test_a_stream_that_ends_by_an_error_has_its_status():
    dead = reply()
    reason = {"type": "abort", "status_code": 503, "message": "The instance has died."}
    dead.event(told([1, 2], reason))
    assert (dead.status, dead.error) == (503, "The instance has died.")


def test_replies_to_one_body_compare_by_everything_that_is_told():
    one = Part(ids=[1, 2], text="ab", finish="length", logprobs=[(-1.0, 1), (-2.0, 2)])
    assert one.differs(Part(ids=[1, 2], text="ab", finish="length")) == "logprobs"
    assert one.differs(Part(ids=[1, 3], text="ab", finish="length")) == "ids"
    near = Part(ids=[1, 2], text="ab", finish="length", logprobs=[(-1.00001, 1), (-2.0, 2)])
    assert one.differs(near) is None
    assert Part(ids=[1], text="a").is_begun_of(one)
    assert not Part(ids=[2], text="b").is_begun_of(one)


def test_processes_have_to_come_back_to_what_they_were():
    was = Held(1, 10, 5, 1 << 30, frozenset({"/dev/shm/a"}))
    same, findings = {"scheduler": was}, Findings()
    checks.compare(same, same, findings)
    assert findings.counts == {}
    grown = Held(1, 90, 50, 2 << 30, frozenset({"/dev/shm/a", "/dev/shm/b"}))
    checks.compare(same, {"scheduler": grown, "new": was}, findings)
    kinds = {"descriptors", "threads", "memory", "shared memory", "a process more"}
    assert set(findings.counts) == kinds


def test_what_a_status_says_at_rest_is_judged():
    kv = {"capacity": 9, "free": 4, "evictable": 4, "host": 0}
    migrations = {"in": [], "out": [], "rejected": {"x": 1}}
    instance = {
        "dp_rank": 0,
        "requests": [],
        "paused": 1,
        "queued": {"thinking": {"waiting": 1}},
        "kv_tokens": kv,
        "policy_errors": 1,
        "migrations": migrations,
        "pauses": {"copy_failed": 1},
    }
    controller = {
        "rejected": {},
        "unsent": 0,
        "live_requests": 2,
        "migrations_under_way": 0,
        "dead": [],
    }
    findings = Findings()
    checks.status_at_rest(
        {"instances": [instance], "controller": controller}, dead=[], findings=findings
    )
    assert findings.counts == {
        "not at rest": 2,
        "KV left": 1,
        "policy errors": 1,
        "rejected messages": 1,
        "copies failed": 1,
        "controller": 1,
    }


def test_a_log_is_judged_but_for_what_is_explained():
    lines = ["Traceback (most recent call last):", "[http_server] Error: known", "fine"]
    assert checks.trouble(lines, [r"\[http_server\] Error"]) == lines[:1]


async def generate(request):
    """Says what the prompt names."""
    asked = await request.json()
    if asked["text"] == "refused":
        raise web.HTTPServiceUnavailable(text="busy")
    number = request.app[COUNT].setdefault(asked["text"], 0)
    request.app[COUNT][asked["text"]] += 1
    ids = [number] * 8 if asked["text"] == "never twice the same" else [1] * 8
    answer = told(ids, LENGTH, rid=asked["rid"], prompt_tokens=3)
    if not asked.get("stream"):
        return web.Response(body=answer, content_type="application/json")
    return web.Response(body=b"data: " + answer + b"\n\n", content_type="text/event-stream")


COUNT = web.AppKey("count", dict)


def test_a_server_that_misbehaves_is_found_out():
    texts = ("fine", "refused", "never twice the same")
    asked = body()
    bodies = [
        Body(kind=text, path="/generate", fields={**asked.fields, "text": text}, limits=[8])
        for text in texts
    ]

    async def go():
        app = web.Application()
        app[COUNT] = {}
        app.router.add_post("/generate", generate)
        app.router.add_post("/abort_request", lambda _: web.Response())
        async with (
            TestServer(app, shutdown_timeout=0.1) as server,
            aiohttp.ClientSession(str(server.make_url("/"))) as session,
        ):
            load = Load(session, bodies, Findings(), tells_status=False)
            for _ in range(2):
                await load.learn(1)
            await load.run(0.3, 2, random.Random(1))
            return load

    load = asyncio.run(go())
    assert set(load.findings.counts) == {"failed", "another text"}
    assert load.tallies["fine"].different == 0
    assert load.tallies["fine"].whole > 1
    assert load.tallies["never twice the same"].different > 0


IDLE = {
    "requests": [],
    "paused": 0,
    "queued": {},
    "kv_tokens": {"capacity": 9, "free": 9, "evictable": 0, "host": 0},
    "policy_errors": 0,
    "migrations": {"in": [], "out": [], "rejected": {}, "outgoing": {"moved": 3}},
    "pauses": {"host": 2},
    "ended": {"answered": 5},
    "recent": [],
}
# A process that is called like a scheduler, and lives until it is killed.
SCHEDULER = (
    "import setproctitle, sys, time; setproctitle.setproctitle('sglang::scheduler_DP1');"
    "print(flush=True); time.sleep(600)"
)


@contextlib.contextmanager
def served(app):
    """The address of an app that runs in a thread of its own."""
    loop, server = asyncio.new_event_loop(), TestServer(app, shutdown_timeout=0.1)
    runner = threading.Thread(target=loop.run_forever, daemon=True)
    runner.start()
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result(60)
    try:
        yield str(server.make_url("/")).rstrip("/")
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        runner.join(60)


def test_a_whole_soak_of_two_instances_of_which_one_dies(monkeypatch):
    """Instance 1 is a process that does nothing; what its server says of it is true but once: at
    the end, its controller still knows a request."""
    monkeypatch.setattr(checks, "REST_S", 1.0)
    victim = subprocess.Popen([sys.executable, "-c", SCHEDULER], stdout=subprocess.PIPE)
    asked = []

    async def status(_request):
        dead = [] if victim.poll() is None else [1]
        instances = [
            {**IDLE, "dp_rank": 0},
            {"dp_rank": 1, "dead": True} if dead else {**IDLE, "dp_rank": 1},
        ]
        controller = {"rejected": {}, "unsent": 0, "migrations_under_way": 0, "dead": dead}
        return web.json_response(
            {"instances": instances, "controller": {**controller, "live_requests": len(dead)}}
        )

    async def anything(request):
        asked.append(request.path)
        return web.json_response({"loads": []})

    app = web.Application()
    app[COUNT] = {}
    app.router.add_post("/generate", generate)
    app.router.add_get("/pascal/status", status)
    app.router.add_route("*", "/{any:.*}", anything)
    assert victim.stdout is not None
    victim.stdout.readline()
    began = time.monotonic()
    with served(app) as url:
        found = soak(
            Task(
                base_url=url,
                seconds=2.0,
                concurrency=2,
                seed=1,
                bodies=[body(), body("other")],
                operations=[n for n in OPERATIONS if n not in ("junk", "pause by abort")],
                after_death=["look"],
                kill=1,
                root=os.getpid(),
            )
        )
    assert time.monotonic() - began < 60
    assert victim.wait(60) < 0
    victim.stdout.close()
    assert found.findings.counts == {"controller": 1}
    assert found.figures["pauses"]["moved"] == 3
    assert set(found.figures["requests"]) == {"thinking", "other"}
    paths = {"/pause_generation", "/update_weights_from_disk", "/flush_cache", "/abort_request"}
    assert paths <= set(asked)
    shown = "\n".join(table("two", found))
    assert "WRONG controller: 1" in shown
    assert re.search(r"^thinking +\d", shown, re.MULTILINE)
