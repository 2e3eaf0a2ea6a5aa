"""The open-loop client against a small server of our own that misbehaves on request."""

import asyncio
import json
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evals.load.client import Target, open_loop
from evals.load.timeline import sample
from evals.workload import Item
from tests.unit import loop_time

SEEN = web.AppKey("seen", list)


def thinking_of(body):
    return body["sampling_params"]["custom_params"]["thinking_budget"]


async def generate(request):
    """Streams what was asked for; a thinking budget above 100 names a way to fail."""
    body = await request.json()
    request.app[SEEN].append(body)
    thinking, total = thinking_of(body), body["sampling_params"]["max_new_tokens"]
    if thinking == 101:
        raise web.HTTPServiceUnavailable(text="busy")
    reply = web.StreamResponse()
    await reply.prepare(request)
    for count in range(1, total + 1):
        meta = {
            "completion_tokens": count,
            "reasoning_tokens": min(count, thinking + 1),
            "finish_reason": {"type": "length"} if count == total else None,
        }
        event = b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n"
        # Cut where a network might: in the middle of an event.
        await reply.write(event[:30])
        await reply.write(event[30:])
        if thinking == 102 and count == 2:
            await asyncio.Event().wait()
        if thinking == 103 and count == 2:
            return reply
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def status(request):
    """Of every request that came: it was paused for as long as its thinking."""
    ended = [
        {
            "rid": body["rid"],
            "breaks": [
                ["paused", 0.5, body["sampling_params"]["custom_params"]["thinking_budget"]]
            ],
        }
        for body in request.app[SEEN]
    ]
    return web.json_response({"instances": [{"dead": True}, {"recent": ended}]})


def send(items, tells=None, answers=generate, skip=None, **bounds):
    """skip: time-outs expire when this holds of the records."""
    records = []

    async def go():
        app = web.Application()
        app[SEEN] = []
        app.router.add_post("/generate", answers)
        if tells is not None:
            app.router.add_get("/pascal/status", tells)
        async with TestServer(app, shutdown_timeout=0.1) as server:
            bounds.setdefault("run_timeout_s", 30.0)
            target = Target(base_url=str(server.make_url("/")), logit_processor="p", **bounds)
            return await open_loop(items, target, 0, records)

    return loop_time.run(go(), records, skip)


def test_a_server_that_is_not_told_lengths_is_told_none():
    seen = []

    async def refuse(request):
        seen.append((await request.json())["sampling_params"])
        raise web.HTTPServiceUnavailable(text="seen")

    send([Item(0.0, 8, 3, 4), Item(0.0, 8, 30, 40)], answers=refuse, own_lengths=500)
    assert {(each["max_new_tokens"], each["ignore_eos"]) for each in seen} == {(500, False)}
    custom = sorted(each["custom_params"]["own_lengths"] for each in seen)
    assert custom == [[3, 4], [30, 40]], "for the processor"
    assert all("thinking_budget" not in each["custom_params"] for each in seen)


def test_many_streams_at_once_lose_nothing():
    items = [Item(i * 0.001, 8, 3, 4) for i in range(400)]
    back = send(items)
    assert len(back.records) == len(items)
    for item, record in zip(items, back.records, strict=True):
        assert (record.finished, record.error) == (True, None)
        assert len(record.token_s) == item.output_tokens
        assert len(record.answer_s) == item.answer_tokens
        assert record.token_s == sorted(record.token_s)
        assert record.arrival_s <= record.sent_s <= record.token_s[0]


def test_every_request_has_the_sampling_parameters_that_were_asked_for():
    seen = []

    async def note(request):
        seen.append((await request.json())["sampling_params"])
        return await generate(request)

    send([Item(0.0, 8, 3, 4), Item(0.0, 8, 3, 5)], answers=note, sampling={"presence_penalty": 1.5})
    assert [params["presence_penalty"] for params in seen] == [1.5, 1.5]
    assert sorted(params["max_new_tokens"] for params in seen) == [8, 9]


def test_what_a_server_tells_of_the_sampled_requests_is_kept():
    items = [Item(0.0, 8, thinking, 4) for thinking in range(1, 21)]
    back = send(items, status)
    for place in sample(items):
        assert back.records[place].breaks == [("paused", 0.5, items[place].thinking_tokens)]
    assert sum(record.breaks is not None for record in back.records) == len(sample(items))


async def _nonsense(_request):
    return web.json_response({"instances": [{"recent": [{"rid": 1}, 2]}]})


@pytest.mark.parametrize("tells", [None, _nonsense])
def test_a_server_that_does_not_tell_is_none_the_worse(tells):
    back = send([Item(0.0, 8, 3, 4)] * 3, tells)
    assert [(r.finished, r.error, r.breaks) for r in back.records] == [(True, None, None)] * 3


def test_each_failure_is_kept_with_its_request():
    items = [Item(0.0, 8, thinking, 4) for thinking in (101, 102, 103, 3)]

    def only_one_goes_on(records):
        _, slow, *_ = records
        ended = sum(record.finished or record.error is not None for record in records)
        return ended == len(records) - 1 and len(slow.token_s) == 2

    bounds = {"request_timeout_s": 60.0, "run_timeout_s": 2 * loop_time.SKIPPED_S}
    refused, slow, cut, fine = send(items, skip=only_one_goes_on, **bounds).records
    assert refused.error == "HTTP 503: busy"
    assert slow.error == "timeout (request)"
    assert len(slow.token_s) == 2
    assert cut.error == "stream ended early"
    assert (fine.finished, fine.error) == (True, None)


@pytest.mark.parametrize("says", [b"data: what\n\n", b'data: {"choices": []}\n\n', b"data: 3\n\n"])
def test_what_is_no_answer_of_sglang_is_the_error_of_its_request_alone(says):
    async def other(request):
        reply = await generate(request)
        if thinking_of(request.app[SEEN][-1]) == 2:
            await reply.write(says)
        return reply

    bad, fine = send([Item(0.0, 8, 2, 4), Item(0.1, 8, 3, 4)], answers=other).records
    assert "not an answer of SGLang" in bad.error
    assert (fine.finished, fine.error) == (True, None)


def test_a_client_that_cannot_keep_up_says_so():
    async def slow(request):
        time.sleep(0.1)  # In the client's own loop, as too many streams would.
        return await generate(request)

    assert send([Item(0.01 * i, 8, 3, 4) for i in range(20)], answers=slow).lag_p99_ms > 50


def test_the_whole_run_is_bounded():
    items = [Item(0.0, 8, 3, 4), Item(0.0, 8, 102, 4), Item(60.0, 8, 3, 4)]
    back = send(items, skip=lambda records: records[0].finished and records[1].token_s)
    fine, slow, unsent = back.records
    assert fine.finished
    assert slow.error == unsent.error == "timeout (run)"
    assert unsent.sent_s is None


def test_a_server_that_is_not_there_is_an_error_of_every_request():
    target = Target(base_url="http://127.0.0.1:9", logit_processor="p")
    back = asyncio.run(open_loop([Item(0.0, 8, 3, 4)] * 2, target, seed=0))
    assert all("Connect" in record.error for record in back.records)
