"""Pacing holds back, never loses, reorders or blocks; and lets go when the client does."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang import pace_stream
from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.pace_stream import Answer, Pacing, generate_request, paced
from pascal_sglang.preflight import LaunchError, check_frontend

TPOT = 0.1


def chunk(tokens, thinking=0, index=None):
    meta = {"completion_tokens": tokens, "reasoning_tokens": thinking}
    return {"meta_info": meta, **({} if index is None else {"index": index})}


def run_through(pacing):
    """Every chunk with its release time, by an ideal clock that jumps from one to the next."""
    out = []
    while (due := pacing.due()) < math.inf:
        now = max(due, out[-1][0] if out else due)
        out += [(now, c) for c in pacing.release(now)]
    return out


def test_a_burst_is_released_one_token_per_tpot_and_thinking_at_once():
    pacing = Pacing(lambda _: TPOT)
    for now, c in [(1.0, chunk(5, 5)), (2.0, chunk(6, 5)), (2.0, chunk(9, 5)), (2.0, chunk(10, 5))]:
        pacing.add(now, c)
    # One thinking chunk, then 1 + 3 + 1 answering tokens from t = 2.
    assert [at for at, _ in run_through(pacing)] == pytest.approx([1.0, 2.0, 2.1, 2.4])


def test_a_late_token_starts_the_pace_anew_and_an_empty_last_chunk_follows_at_once():
    pacing = Pacing(lambda _: TPOT)
    for now, c in [(0.0, chunk(1)), (5.0, chunk(2)), (5.0, chunk(3)), (5.0, chunk(3))]:
        pacing.add(now, c)
    assert [at for at, _ in run_through(pacing)] == pytest.approx([0.0, 5.0, 5.1, 5.1])


def test_the_buffer_is_bounded_and_the_oldest_leave_early(monkeypatch):
    monkeypatch.setattr(pace_stream, "BUFFER_TOKENS", 3)
    answer = Answer(TPOT)
    for tokens in range(1, 7):
        answer.add(0.0, chunk(tokens), tokens)
    left_early = 0
    while answer.due == -math.inf:
        answer.release()
        left_early += 1
    assert (left_early, answer.held_tokens) == (3, 3)
    assert answer.due == pytest.approx(0.3), "the fourth token is due three after the first"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2), st.integers(0, 4)), max_size=40),
    st.floats(0.001, 1),
)
@settings(deadline=None)
def test_nothing_is_lost_reordered_or_early(arrivals, tpot):
    """Several answers interleaved: each comes out whole, in order, no faster than its pace."""
    pacing = Pacing(lambda _: tpot)
    tokens, now, put = [0] * 4, 0.0, []
    for index, gap, new in arrivals:
        now += gap
        tokens[index] += new
        put.append((now, chunk(tokens[index], index=index)))
        pacing.add(*put[-1])
    out = run_through(pacing)
    for index in range(4):
        mine = [c for _, c in out if c["index"] == index]
        assert mine == [c for _, c in put if c["index"] == index]
        shown = [(at, c["meta_info"]["completion_tokens"]) for at, c in out if c["index"] == index]
        reading_until, before = -math.inf, 0
        for at, after in shown:
            if after > before:
                assert at >= reading_until - 1e-9, "faster than the reader"
                reading_until = at + (after - before) * tpot
                before = after
    ends = {c["index"]: at for at, c in out}
    for index, end in ends.items():
        arrived = [
            (at, c["meta_info"]["completion_tokens"]) for at, c in put if c["index"] == index
        ]
        latest = max(at for at, _ in arrived)
        assert end <= latest + tpot * tokens[index] + 1e-6, "delayed beyond the pace"


def collect(generator):
    async def run():
        return [c async for c in generator]

    return asyncio.run(asyncio.wait_for(run(), 10))


async def stream_of(chunks, error=None):
    for c in chunks:
        yield c
    if error is not None:
        raise error


def test_chunks_pass_through_in_order():
    chunks = [chunk(n) for n in range(1, 30)]
    assert collect(paced(stream_of(chunks), Pacing(lambda _: 0.001))) == chunks


def test_an_error_comes_after_what_came_before_it():
    chunks, seen = [chunk(n) for n in range(1, 5)], []

    async def run():
        async for c in paced(stream_of(chunks, ValueError("bad")), Pacing(lambda _: 0.001)):
            seen.append(c)

    with pytest.raises(ValueError, match="bad"):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert seen == chunks


def test_closing_cancels_the_stream_where_it_waits():
    ended = []

    async def endless():
        try:
            yield chunk(1)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def run():
        generator = paced(endless(), Pacing(lambda _: TPOT))
        await anext(generator)
        await asyncio.sleep(0)
        await generator.aclose()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert ended == ["cancelled"]


@pytest.mark.parametrize("config", [PascalConfig(), PascalConfig(pace_stream=True), None])
def test_what_is_not_streamed_or_not_asked_for_is_left_be(config, monkeypatch):
    if config is None:
        monkeypatch.delenv(CONFIG_ENV, raising=False)
    else:
        monkeypatch.setenv(CONFIG_ENV, config.to_json())
    stream = stream_of([])
    asked = SimpleNamespace(stream=bool(config is None or not config.pace_stream))
    assert generate_request(lambda *_: stream, None, asked) is stream


def test_each_request_may_bring_its_own_pace(monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, PascalConfig(pace_stream=True, answer_tpot_ms=9e6).to_json())
    own = {"custom_params": {"pascal": {"answer_tpot_ms": 1}}}
    obj = SimpleNamespace(stream=True, sampling_params=own)
    chunks = [chunk(1), chunk(2), chunk(3)]
    assert collect(generate_request(lambda *_: stream_of(chunks), None, obj)) == chunks


@pytest.mark.parametrize("asked", ["pace_stream", "assume_reasoning"])
def test_several_tokenizer_workers_are_refused(asked):
    one, two = (SimpleNamespace(tokenizer_worker_num=n) for n in (1, 2))
    config = PascalConfig(**{asked: True})
    check_frontend(config, one)
    check_frontend(PascalConfig(), two)
    with pytest.raises(LaunchError, match=r"--pascal-.* does not work with --tokenizer-worker-num"):
        check_frontend(config, two)
