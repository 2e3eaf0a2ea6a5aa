"""A watched replay against a small server of our own; Ctrl-C is a real signal."""

import asyncio
import json
import os
import signal

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evals.load import attended
from evals.load.attended import CUT, attend
from evals.load.client import Target, open_loop
from evals.workload import Item


async def generate(request):
    """One token, then the rest; a prompt of 99 tokens waits between the two."""
    asked = await request.json()
    total = asked["sampling_params"]["max_new_tokens"]
    reply = web.StreamResponse()
    await reply.prepare(request)
    for count in (1, total):
        end = {"type": "length"} if count == total else None
        meta = {"completion_tokens": count, "reasoning_tokens": 1, "finish_reason": end}
        await reply.write(b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n")
        if len(asked["input_ids"]) == 50 and end is None:
            await asyncio.sleep(0.2)
        if len(asked["input_ids"]) == 99 and end is None:
            await asyncio.Event().wait()
    return reply


async def interrupt_when(holds):
    while not holds():
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def watch(items, *, interrupt=None, **bounds):
    """interrupt: Ctrl-C comes when this holds of the records."""

    def watched(items, target, seed, records):
        if interrupt is not None:
            waits = interrupt_when(lambda: records and interrupt(records))
            tasks.append(asyncio.create_task(waits))
        return open_loop(items, target, seed, records)

    tasks = []

    async def go():
        app = web.Application()
        app.router.add_post("/generate", generate)
        async with TestServer(app, shutdown_timeout=0.1) as server:
            target = Target(base_url=str(server.make_url("/")), logit_processor="", **bounds)
            return await attend(items, target, 0, bar=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attended, "open_loop", watched)
        return asyncio.run(go())


def test_a_run_left_alone_is_whole():
    items = [Item(0.01 * i, 8, 3, 4) for i in range(5)]
    back = watch(items)
    assert back.items == items
    assert [(r.finished, r.error) for r in back.records] == [(True, None)] * 5
    assert (back.interrupted, back.unsent) == (False, 0)
    assert back.lag_p99_ms is not None


def test_an_interrupted_run_keeps_what_came_back():
    items = [Item(0.0, 8, 3, 4), Item(0.0, 99, 3, 4), Item(60.0, 8, 3, 4)]
    back = watch(items, interrupt=lambda records: records[0].finished and records[1].token_s)
    assert (back.interrupted, back.unsent) == (True, 1)
    assert back.items == items[:2]
    done, cut = back.records
    assert (done.finished, done.error, len(done.token_s)) == (True, None, 8)
    assert (cut.finished, cut.error, len(cut.token_s)) == (False, CUT, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_more_at_a_time_than_asked_and_who_waits_is_due_when_its_turn_comes():
    items = [Item(0.0, 50, 3, 4)] * 4
    back = watch(items, max_concurrency=2)
    spans = [(r.arrival_s, r.token_s[-1]) for r in back.records]
    assert all(r.error is None for r in back.records)
    assert spans[2][0] >= min(end for _, end in spans[:2])
    assert all(r.arrival_s <= r.sent_s for r in back.records)
