"""A paced stream never loses, reorders or blocks; and lets go when the client does."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from pascal_sglang.config import CONFIG_ENV, LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_frontend
from pascal_sglang.streaming import pacing
from pascal_sglang.streaming.pace_stream import generate_request, paced
from pascal_sglang.streaming.pacing import Pacing

NEVER = 1e6


def chunk(tokens, index=None):
    meta = {"completion_tokens": tokens, "reasoning_tokens": 0}
    return {"meta_info": meta, **({} if index is None else {"index": index})}


def at_pace(tpot):
    return Pacing(lambda _: tpot)


def run(coroutine):
    """Run to the end, within a time-out, and insist that no task is left."""

    async def alone():
        async with asyncio.timeout(20):
            result = await coroutine
            await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "something goes on"
        return result

    return asyncio.run(alone())


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def collected(generator):
    return [c async for c in generator]


async def stream_of(chunks, error=None):
    for c in chunks:
        yield c
    if error is not None:
        raise error


class Endless:
    """A stream that brings a token whenever the loop turns, and tells how it ended."""

    def __init__(self, stop_after=math.inf):
        self.made, self.ended, self.stop_after = 0, "", stop_after

    async def stream(self):
        try:
            while self.made < self.stop_after:
                await asyncio.sleep(0)
                self.made += 1
                yield chunk(self.made)
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended = type(error).__name__
            raise


def test_chunks_pass_through_in_order():
    chunks = [chunk(n) for n in range(1, 30)]
    assert run(collected(paced(stream_of(chunks), at_pace(0.001)))) == chunks


def test_chunks_leave_when_they_are_due_by_the_clock_given():
    chunks, seen = [chunk(n) for n in range(1, 5)], []

    async def go():
        loop = asyncio.get_running_loop()
        async for c in paced(stream_of(chunks), at_pace(0.02), clock=loop.time):
            seen.append((loop.time(), c))

    run(go())
    assert [c for _, c in seen] == chunks
    assert seen[-1][0] - seen[0][0] >= 0.9 * 3 * 0.02


@pytest.mark.parametrize("before", [0, 4])
def test_an_error_comes_after_what_came_before_it_and_waits_for_no_reader(before):
    chunks, seen = [chunk(n) for n in range(1, before + 1)], []

    async def go():
        async for c in paced(stream_of(chunks, ValueError("bad")), at_pace(NEVER)):
            seen.append(c)

    with pytest.raises(ValueError, match="bad"):
        run(go())
    assert seen == chunks


def test_closing_cancels_the_stream_where_it_waits():
    endless = Endless(stop_after=3)

    async def go():
        generator = paced(endless.stream(), at_pace(NEVER))
        await anext(generator)
        await settle()
        await generator.aclose()
        await settle()
        assert endless.ended == "CancelledError"

    run(go())


def test_a_cancelled_client_cancels_the_stream():
    endless = Endless(stop_after=3)

    async def go():
        client = asyncio.create_task(collected(paced(endless.stream(), at_pace(NEVER))))
        await settle()
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        await settle()
        assert endless.ended == "CancelledError"

    run(go())


def test_an_abandoned_stream_is_closed():
    endless = Endless()

    async def go():
        async for _ in paced(endless.stream(), at_pace(NEVER)):
            break
        await settle()
        assert endless.ended

    run(go())


def test_a_stream_dropped_between_two_runs_of_the_loop_is_closed(recwarn):
    """As `Engine` iterates: each step its own run of the loop, begun outside of it."""
    endless = Endless()
    loop = asyncio.new_event_loop()
    generator = paced(endless.stream(), at_pace(0.001))
    for number in (1, 2, 3):
        c = loop.run_until_complete(generator.__anext__())
        assert c["meta_info"]["completion_tokens"] == number
    del generator
    loop.run_until_complete(settle())
    assert endless.ended
    assert asyncio.all_tasks(loop) == set()
    loop.close()
    assert [str(w.message) for w in recwarn] == []


def test_a_client_that_does_not_take_stops_the_reading(monkeypatch):
    monkeypatch.setattr(pacing, "BUFFER_TOKENS", 5)
    endless = Endless()

    async def go():
        generator = paced(endless.stream(), at_pace(NEVER))
        await anext(generator)
        for _ in range(100):
            await asyncio.sleep(0)
        assert endless.made <= 1 + 5 + 1
        taken = [await anext(generator) for _ in range(20)]
        assert [c["meta_info"]["completion_tokens"] for c in taken] == list(range(2, 22))
        await generator.aclose()
        await settle()
        assert endless.ended

    run(go())


def test_a_server_that_stops_holds_nothing_back():
    chunks = [chunk(n) for n in range(1, 30)]
    out = run(collected(paced(stream_of(chunks), at_pace(NEVER), stopping=lambda: True)))
    assert out == chunks


def asked(**more):
    return SimpleNamespace(stream=True, sampling_params={}, parallel_sample_num=1, **more)


@pytest.mark.parametrize("config", [PascalConfig(), PascalConfig(pace_stream=True), None])
def test_what_is_not_streamed_or_not_asked_for_is_left_be(config, monkeypatch):
    if config is None:
        monkeypatch.delenv(CONFIG_ENV, raising=False)
    else:
        monkeypatch.setenv(CONFIG_ENV, config.to_json())
    streamed = config is None or not config.pace_stream
    stream = stream_of([])
    obj = SimpleNamespace(stream=streamed)
    assert generate_request(lambda *_: stream, None, obj) is stream
    # As SGLang's gRPC bridge calls it; and embedding requests have no `stream`.
    assert generate_request(lambda *_, request: stream, None, obj, request=None) is stream
    if not streamed:
        assert generate_request(lambda *_: stream, None, SimpleNamespace()) is stream


def request_pace(ms):
    return {"custom_params": {"pascal": {"answer_tpot_ms": ms}}}


MANAGER = SimpleNamespace(gracefully_exit=False)


def test_a_request_may_bring_its_own_pace(monkeypatch):
    slow = PascalConfig(pace_stream=True, answer_tpot_ms=NEVER)
    monkeypatch.setenv(CONFIG_ENV, slow.to_json())
    obj = SimpleNamespace(stream=True, sampling_params=request_pace(1))
    chunks = [chunk(1), chunk(2), chunk(3)]
    assert run(collected(generate_request(lambda *_: stream_of(chunks), MANAGER, obj))) == chunks


@pytest.mark.parametrize(("samples", "quick"), [(1, [1]), (2, [2, 3])])
def test_each_prompt_of_a_batch_may_bring_its_own_pace(monkeypatch, samples, quick):
    """Answers are numbered prompt by prompt; SGLang repeats the list of parameters per sample."""
    slow = PascalConfig(pace_stream=True, answer_tpot_ms=NEVER)
    monkeypatch.setenv(CONFIG_ENV, slow.to_json())
    params = [{}, request_pace(1)] * samples
    obj = SimpleNamespace(stream=True, sampling_params=params, parallel_sample_num=samples)
    chunks = [chunk(n, index) for n in (1, 2) for index in range(2 * samples)]

    async def go():
        generator = generate_request(lambda *_: stream_of(chunks), MANAGER, obj)
        out = [await anext(generator) for _ in range(3 * samples)]
        await generator.aclose()
        return [c["index"] for c in out if c["meta_info"]["completion_tokens"] == 2]

    assert sorted(run(go())) == quick


def arguments(workers=1, smg=False, grpc=False):
    return SimpleNamespace(tokenizer_worker_num=workers, smg_grpc_mode=smg, grpc_mode=grpc)


WANTED = (
    {"pace_stream": True},
    {"assume_reasoning": True},
    {"max_ttfo": 9.0},
    {"brownout": "P75"},
    {"tool_kv": 0.2},
)


@pytest.mark.parametrize("flag", WANTED)
@pytest.mark.parametrize(
    ("served", "says"),
    [
        (arguments(workers=2), "--tokenizer-worker-num"),
        (arguments(smg=True), "--smg-grpc-mode"),
        (arguments(grpc=True), "--smg-grpc-mode"),
    ],
)
def test_front_ends_without_our_hooks_are_refused(flag, served, says):
    config = PascalConfig(**flag)
    check_frontend(PascalConfig(), served)
    with pytest.raises(LaunchError, match=rf"^--pascal-.* does not work with {says}"):
        check_frontend(config, served)


def test_what_takes_no_effect_is_refused(monkeypatch):
    monkeypatch.setattr(PascalConfig, "effective", lambda config, _: config)
    args = SimpleNamespace(**vars(arguments()), enable_strict_thinking=False)
    ends = SimpleNamespace(**vars(arguments()), enable_strict_thinking=True)
    for flags in ({"brownout": "P90"}, {"effort_budgets": "low=5"}):
        with pytest.raises(LaunchError, match="needs --enable-strict-thinking"):
            check_frontend(PascalConfig(**flags), args)
        check_frontend(PascalConfig(**flags), ends)
        check_frontend(PascalConfig(**flags, default_thinking_budget=100), args)
    for flags in ({"brownout": "P90"}, {"max_ttfo": 5.0}):
        with pytest.raises(LaunchError, match="needs forecasts, which policy fcfs does not make"):
            check_frontend(PascalConfig(policy="fcfs", **flags), ends)
    check_frontend(PascalConfig(max_ttfo=5.0, pace_stream=True, assume_reasoning=True), args)


def test_the_rust_front_end_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(LaunchError, match="SGLANG_RUST_SERVER"):
        check_frontend(PascalConfig(pace_stream=True), arguments())
