"""What a length table says after what it has seen."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.length_table import (
    ANSWERS,
    EDGES,
    FADES,
    SEED_REQUESTS,
    THINKING,
    LengthTable,
)

lengths = st.integers(0, EDGES[-1] + 10)
histories = st.lists(st.tuples(lengths, st.booleans()), max_size=60)
shares = st.floats(0.01, 0.99)


def table_of(history, seed=THINKING):
    table = LengthTable(seed)
    for tokens, cut in history:
        if cut:
            table.passed(0, tokens)
        else:
            table.ended(0, tokens)
    return table


@given(history=histories, given_tokens=lengths, share=shares)
def test_a_quantile_is_where_so_many_have_ended(history, given_tokens, share):
    table = table_of(history)
    found = table.quantile(share, given_tokens)
    assert found >= given_tokens
    if found < EDGES[-1]:
        assert 1 - table.survival(found, given_tokens) == pytest.approx(share, abs=1e-6)


@given(history=histories, given_tokens=lengths, pair=st.tuples(shares, shares))
def test_more_of_them_take_longer(history, given_tokens, pair):
    table = table_of(history)
    low, high = sorted(pair)
    assert table.quantile(low, given_tokens) <= table.quantile(high, given_tokens)


@given(history=histories, first=lengths, second=lengths, share=shares)
def test_what_has_come_further_ends_later(history, first, second, share):
    table = table_of(history)
    less, more = sorted((first, second))
    assert table.quantile(share, less) <= table.quantile(share, more) + 1e-6


@given(history=histories, stops=st.lists(lengths, min_size=1, max_size=6))
def test_it_does_not_matter_how_often_a_request_is_looked_at(history, stops):
    once, often = table_of(history), table_of(history)
    *between, end = sorted(stops)
    once.ended(0, end)
    before = 0
    for tokens in between:
        often.passed(before, tokens)
        before = tokens
    often.ended(before, end)
    assert often.hazards == once.hazards


@pytest.mark.parametrize("seed", [THINKING, ANSWERS])
def test_until_there_is_data_it_has_the_shape_of_its_seed(seed):
    table = LengthTable(seed)
    for share, tokens in seed[2:-2]:
        assert table.quantile(share) == pytest.approx(tokens, rel=0.1)
    assert table.survival(2 * seed[-1][1]) > 0


def test_it_learns_and_unlearns():
    rnd = random.Random(0)
    table = LengthTable(THINKING)
    for _ in range(2000):
        table.ended(0, round(rnd.uniform(40, 60)))
    assert table.quantile(0.5) == pytest.approx(50, rel=0.15)
    for _ in range(round(8 / FADES)):
        table.ended(0, round(rnd.uniform(3000, 5000)))
    assert table.quantile(0.1) > 2500
    assert table.quantile(0.5) == pytest.approx(4000, rel=0.1)
    assert table.learnt == 2000 + round(8 / FADES)


def test_requests_that_go_on_are_not_forgotten():
    """Of a hundred that begin together, the short ones end first; the others are known to be
    longer. A table of those that have ended alone would say 100 tokens."""
    table = LengthTable(THINKING)
    for _ in range(4):
        for number in range(100):
            if number < 30:
                table.ended(0, 100)
            else:
                table.passed(0, 2000)
    share = 1 - table.survival(150)
    assert share == pytest.approx(0.3, abs=0.03)
    assert table.quantile(0.5) > 1900


def test_the_seed_weighs_a_few_requests():
    table = LengthTable(THINKING)
    for _ in range(round(10 * SEED_REQUESTS)):
        table.ended(0, 20_000)
    assert table.quantile(0.5) > 10_000
