"""When chunks leave: the reader's pace, in order, bounded, one answer not behind another."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascal_sglang.streaming import pacing as pacing_module
from pascal_sglang.streaming.pacing import BUFFER_TOKENS, Pacing

TPOT = 0.1


def chunk(tokens, thinking=0, index=None, finish=None):
    meta = {"finish_reason": finish, "completion_tokens": tokens, "reasoning_tokens": thinking}
    return {"meta_info": meta, **({} if index is None else {"index": index})}


def filled(*arrivals):
    pacing = Pacing(lambda _: TPOT)
    for now, c in arrivals:
        pacing.add(now, c)
    return pacing


def run_through(pacing):
    """Every chunk with its release time, by an ideal clock that jumps from one to the next."""
    out = []
    while not pacing.empty:
        now = max(pacing.due(), out[-1][0] if out else -math.inf)
        out += [(now, c) for c in pacing.release(now)]
    return out


def test_a_burst_leaves_one_token_per_tpot_and_thinking_at_once():
    burst = [(1.0, chunk(5, 5)), (2.0, chunk(6, 5)), (2.0, chunk(9, 5)), (2.0, chunk(10, 5))]
    # One thinking chunk, then 1 + 3 + 1 answering tokens from t = 2.
    assert [at for at, _ in run_through(filled(*burst))] == pytest.approx([1.0, 2.0, 2.1, 2.4])


def test_a_late_token_starts_the_pace_anew_and_an_empty_last_chunk_follows_at_once():
    late = [(0.0, chunk(1)), (5.0, chunk(2)), (5.0, chunk(3)), (5.0, chunk(3))]
    assert [at for at, _ in run_through(filled(*late))] == pytest.approx([0.0, 5.0, 5.1, 5.1])


def test_tokens_that_turn_out_to_open_a_thought_are_not_counted_as_read():
    opened = [(0.0, chunk(1, 0)), (0.0, chunk(2, 2)), (9.0, chunk(3, 2)), (9.0, chunk(4, 2))]
    assert [at for at, _ in run_through(filled(*opened))] == pytest.approx([0.0, 0.0, 9.0, 9.1])


def test_a_slow_answer_does_not_hold_back_another():
    pacing = Pacing(lambda index: 100.0 if index == 0 else TPOT)
    for tokens in (1, 2, 3):
        for index in (0, 1):
            pacing.add(0.0, chunk(tokens, index=index))
    assert [c["index"] for c in pacing.release(0.25)] == [0, 1, 1, 1]
    assert pacing.due() == 100.0


def test_the_oldest_leave_early_when_too_much_is_held(monkeypatch):
    monkeypatch.setattr(pacing_module, "BUFFER_TOKENS", 3)
    pacing = filled(*((0.0, chunk(tokens)) for tokens in range(1, 7)))
    assert pacing.crowded
    assert len(list(pacing.release(0.0))) == 3
    assert not pacing.crowded
    assert pacing.due() == pytest.approx(0.3), "the fourth token is due three after the first"


def test_an_aborted_answer_leaves_at_once_and_alone():
    others = [(0.0, chunk(tokens, index=1)) for tokens in (1, 2)]
    mine = [(0.0, chunk(tokens, index=0)) for tokens in (1, 2, 3)]
    end = chunk(3, index=0, finish={"type": "abort", "message": "asked to"})
    pacing = filled(*others, *mine, (0.0, end))
    out = list(pacing.release(0.0))
    assert [c for c in out if c["index"] == 0] == [c for _, c in mine] + [end]
    assert len(out) == 5
    assert pacing.due() == pytest.approx(TPOT)


arrivals_of_four = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 2), st.integers(0, 4), st.booleans()), max_size=60
)


@given(arrivals_of_four, st.floats(0.001, 1))
@settings(deadline=None)
def test_nothing_is_lost_reordered_early_or_late(arrivals, tpot):
    """Several answers interleaved: each comes out whole, in order, and exactly at its pace."""
    pacing, tokens, now, put, out = Pacing(lambda _: tpot), [0] * 4, 0.0, [], []
    for index, gap, new, take in arrivals:
        now += gap
        tokens[index] += new
        put.append((now, chunk(tokens[index], index=index)))
        pacing.add(*put[-1])
        while take and pacing.due() <= now:
            due = max(pacing.due(), out[-1][0] if out else 0.0)
            out += [(due, c) for c in pacing.release(due)]
    out += run_through(pacing)
    for index in range(4):
        mine = [(at, c) for at, c in put if c["index"] == index]
        assert [c for _, c in mine] == [c for _, c in out if c["index"] == index]
        read_until = before = due = 0
        for (came, c), left in zip(mine, [at for at, x in out if x["index"] == index], strict=True):
            new, before = tokens_of(c) - before, tokens_of(c)
            due = max(came, read_until if new else due)
            assert left >= due - 1e-9, "ahead of the reader"
            read_until = due + new * tpot if new else read_until


def tokens_of(c):
    return c["meta_info"]["completion_tokens"]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 700)), max_size=40), st.booleans())
@settings(deadline=None)
def test_what_is_held_is_bounded_and_still_in_order(news, taken):
    pacing, tokens, put, out = Pacing(lambda _: TPOT), [0, 0], [[], []], []
    for index, new in news:
        tokens[index] += new
        put[index].append(chunk(tokens[index], index=index))
        pacing.add(0.0, put[index][-1])
        assert all(a.held_tokens <= BUFFER_TOKENS for a in pacing._answers.values())
        if taken:
            out += pacing.release(0.0)
            assert not pacing.crowded
    out += pacing.release(math.inf)
    assert pacing.empty
    for index in (0, 1):
        assert [c for c in out if c["index"] == index] == put[index]
