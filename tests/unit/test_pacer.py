"""The reader's timeline against hand-computed ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.pacer import Pacer


def read(times, tpot=1.0):
    pacer = Pacer(tpot)
    for now in times:
        pacer.deliver(now, 1)
    return pacer


def test_on_pace_is_perfect():
    pacer = read([5.0, 6.0, 7.0])
    assert pacer.qoe == 1.0
    assert pacer.slack(7.0) == 1.0


def test_ahead_of_pace_builds_a_buffer():
    pacer = read([5.0, 5.0, 5.0, 5.0])
    assert pacer.last_shown == 8.0
    assert pacer.slack(5.0) == 4.0
    assert pacer.qoe == 1.0


def test_a_late_token_by_hand():
    # Due at 0, 1, 2; shown at 0, 3, 4. S_delay = 2 + 2; end = 5; S_whole = 5 + 4 + 3.
    pacer = read([0.0, 3.0, 3.0])
    assert pacer.last_shown == 4.0
    assert pacer.qoe == pytest.approx(1 - 4 / 12)


def test_before_the_first_token_the_reader_is_out_of_patience():
    assert Pacer(1.0).slack(100.0) < 0
    assert Pacer(1.0).qoe == 1.0


@given(
    gaps=st.lists(st.floats(0, 10), min_size=1, max_size=40),
    tpot=st.floats(0.01, 2),
    split=st.booleans(),
)
def test_quality_stays_in_bounds_and_falls_only_by_delay(gaps, tpot, split):
    pacer, now = Pacer(tpot), 0.0
    for gap in gaps:
        now += gap
        before = pacer.slack(now)
        pacer.deliver(now, 2 if split else 1)
        assert 0.0 <= pacer.qoe <= 1.0
        assert pacer.slack(now) >= min(before, 0) + tpot - 1e-9
    if all(gap <= tpot for gap in gaps):
        assert pacer.qoe == pytest.approx(1.0)


@given(
    deliveries=st.lists(
        st.tuples(st.floats(0, 5), st.integers(0, 30), st.floats(0, 3)), min_size=1, max_size=8
    ),
    tpot=st.floats(0.05, 2),
)
def test_many_tokens_at_once_are_as_one_by_one(deliveries, tpot):
    together, single, now = Pacer(tpot), Pacer(tpot), 0.0
    for gap, tokens, every in deliveries:
        now += gap
        together.deliver(now, tokens, every)
        for i in range(tokens):
            single.deliver(now + i * every, 1)
        now += max(0, tokens - 1) * every
        assert together.delivered == single.delivered
        assert together.first_shown == single.first_shown
        assert together.last_shown == pytest.approx(single.last_shown)
        assert together.delay == pytest.approx(single.delay, abs=1e-6)
        assert together.qoe == pytest.approx(single.qoe, abs=1e-6)


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 3), st.booleans()), max_size=40),
    tpot=st.sampled_from([0.1, 0.7]),
    floor=st.sampled_from([0.0, 0.5]),
)
def test_reading_changes_nothing(steps, tpot, floor):
    """Rank 0 of an instance reads more often than the others, and all must decide alike."""
    read_often, left_alone, now, tokens = Pacer(tpot), Pacer(tpot), 0.0, 0
    for gap, more, reads in steps:
        now, tokens = now + gap, tokens + more
        for pacer in (read_often, left_alone):
            if now <= pacer.early_until and floor <= tpot:
                pacer.received = tokens
            elif tokens > pacer.received:
                pacer.receive(now, tokens, floor)
        if reads:
            assert 0.0 <= read_often.qoe <= 1.0
            read_often.slack(now)
        assert read_often == left_alone
