"""Promises of the ranges that are learnt from what came of earlier forecasts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.forecast_errors import (
    ARRIVAL,
    EARLY,
    INSIDE,
    LARGEST,
    LATE,
    LEAST,
    MOST,
    NARROWEST,
    OUTCOMES,
    SEEDS,
    SHARES,
    WAITING,
    WHEN,
    WIDEST,
    Expected,
    ForecastErrors,
    Recent,
    made_at,
    range_of,
)

seconds = st.floats(0, 1e6)
expecteds = st.builds(Expected, seconds, st.floats(0, 1))
whens, outcomes = st.sampled_from(WHEN), st.sampled_from(OUTCOMES)
histories = st.lists(st.tuples(whens, expecteds, seconds, outcomes), max_size=60)


def learnt(history):
    found = ForecastErrors()
    for made, expected, came, outcome in history:
        found.learn(made, expected, came)
        found.came_out(made, outcome)
    return found


def come(found, made, expected, came):
    """An answer begins, and its forecast is compared: what came of it."""
    low, _, high = range_of([expected] * 3, found.of(made))
    outcome = EARLY if came < low else LATE if came > high else INSIDE
    found.learn(made, expected, came)
    found.came_out(made, outcome)
    return outcome


@given(history=histories, lengths=st.lists(expecteds, min_size=3, max_size=3), made=whens)
def test_whatever_came_a_range_is_one(history, lengths, made):
    lengths.sort()
    found = range_of(lengths, learnt(history).of(made))
    assert 0 <= found.p10 <= found.p50 <= found.p90 < math.inf
    assert range_of(lengths, learnt(history).of(made)) == found, "the same history, the same range"


@given(errors=st.lists(st.floats(-3, 3), min_size=1, max_size=2 * MOST))
def test_only_the_last_errors_count(errors):
    recent, fresh = Recent(), Recent()
    for error in errors:
        recent.add(error)
    for error in errors[-MOST:]:
        fresh.add(error)
    assert len(recent) == min(len(errors), MOST)
    assert recent.errors() == fresh.errors()
    low, middle, high = recent.errors()
    assert min(errors[-MOST:]) <= low <= middle <= high <= max(errors[-MOST:])


@pytest.mark.parametrize("spread", [0.05, 0.5, 1.5])
@pytest.mark.parametrize("waits", [0.0, 0.9])
def test_the_range_holds_as_many_as_it_says(spread, waits):
    """Of errors like those that came before, whatever their distribution."""
    rng = np.random.default_rng(5)
    found, inside = ForecastErrors(), 0
    for number in range(3000):
        expected = Expected(float(rng.uniform(1, 100)), waits)
        came = expected.seconds * float(np.exp(rng.standard_t(3) * spread + 0.3))
        outcome = come(found, "0s", expected, came)
        inside += number >= 1000 and outcome == INSIDE
    assert inside / 2000 == pytest.approx(SHARES[-1] - SHARES[0], abs=0.03)


@pytest.mark.parametrize("drift", [1.002, 1 / 1.002])
def test_no_more_than_a_tenth_is_beyond_the_range_where_errors_only_grow(drift):
    """Those seen lately are smaller than the next one: the range is made wider. The median lags, so
    none is before it."""
    rng = np.random.default_rng(6)
    found, inside, expected = ForecastErrors(), 0, Expected(10.0, 0.0)
    for number in range(2000):
        came = 10.0 * drift**number * float(np.exp(rng.normal() * 0.05))
        outcome = come(found, ARRIVAL, expected, came)
        inside += number >= 500 and outcome == INSIDE
    assert inside / 1500 == pytest.approx(0.9, abs=0.03)


def test_it_follows_what_changes():
    found, expected = ForecastErrors(), Expected(10.0, 0.0)
    for came in [*[10.0] * 500, *[30.0] * MOST]:
        come(found, "0s", expected, came)
    assert range_of([expected] * 3, found.of("0s")).p50 == pytest.approx(30, rel=0.01)


def test_until_enough_was_seen_of_a_kind_it_goes_by_the_seed():
    found = ForecastErrors()
    for number in range(LEAST):
        assert found.of("0s")[0] == list(SEEDS), number
        found.learn("0s", Expected(2.0, 0.0), 4.0)
    seen, *others = found.of("0s")[0]
    assert seen == (pytest.approx(math.log(2), rel=0.05),) * 3
    assert others == list(SEEDS[1:]), "of those that wait, nothing was seen"
    assert found.of(WAITING)[0] == list(SEEDS), "nor of those made at another time"


def test_how_much_wider_ranges_get_is_bounded():
    found = ForecastErrors()
    for outcome, (below, above) in {
        LATE: (NARROWEST, WIDEST),
        EARLY: (WIDEST, NARROWEST),
        INSIDE: (NARROWEST, NARROWEST),
    }.items():
        for _ in range(1000):
            found.came_out("10s", outcome)
        assert found.of("10s")[1:] == (below, above)


def test_a_length_that_is_open_widens_the_range():
    seed = ForecastErrors().of("0s")
    known = range_of([Expected(20.0, 0.0)] * 3, seed)
    lengths = range_of([Expected(s, 0.0) for s in (10.0, 20.0, 40.0)], seed)
    assert lengths.p10 < 10.5
    assert lengths.p90 > 40
    assert known.p50 == lengths.p50


def test_no_error_is_endless():
    found = ForecastErrors()
    for _ in range(LEAST):
        found.learn(WAITING, Expected(0.0, 0.0), 1e300)
    assert found.of(WAITING)[0][0] == (LARGEST,) * 3


def test_a_forecast_is_called_by_when_it_was_made():
    assert [made_at(s) for s in (None, -1.0, 0.0, 9.9, 10.0, 95.0)] == [
        WAITING,
        *("0s", "0s", "0s", "10s", "90s"),
    ]
