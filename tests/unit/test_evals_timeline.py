"""Timelines and details against token times written by hand; seconds."""

import pytest

from evals.load.record import Break, Record
from evals.load.timeline import details, sample, segments
from evals.workload import Item


def record(token_s, reasoning, arrival_s=10.0, error=None):
    return Record(arrival_s, arrival_s, list(token_s), reasoning, error is None, error)


def shown(found):
    return [(state, round(start, 6), round(end, 6)) for state, start, end in found]


def test_phases_follow_each_other_and_the_marker_ends_the_thinking():
    # Two thinking tokens, the marker at 11.2, two answering tokens.
    seen = segments(record([11.0, 11.1, 11.2, 11.3, 11.4], 3), end_s=20.0)
    assert shown(seen) == [
        ("queued", 0.0, 1.0),
        ("thinking", 1.0, 1.2),
        ("answering", 1.2, 1.4),
    ]


def test_a_gap_of_more_than_ten_medians_is_a_stall_in_either_phase():
    token_s = [10.0, 10.1, 10.2, 12.0, 12.1, 12.2, 14.0, 14.1]
    seen = segments(record(token_s, 4), end_s=20.0)
    assert shown(seen) == [
        ("queued", 0.0, 0.0),
        ("thinking", 0.0, 0.2),
        ("stalled", 0.2, 2.0),
        ("answering", 2.0, 2.2),
        ("stalled", 2.2, 4.0),
        ("answering", 4.0, 4.1),
    ]


def test_exactly_ten_medians_are_no_stall():
    seen = segments(record([10.0, 11.0, 12.0, 13.0, 23.0], 9), end_s=30.0)
    assert [s.state for s in seen] == ["queued", "thinking"]


def test_tokens_of_one_event_have_no_gap_and_do_not_shift_the_median():
    token_s = [10.0, 10.0, 10.0, 10.0, 11.0, 11.0, 12.0, 12.0]
    seen = segments(record(token_s, 9), end_s=20.0)
    assert shown(seen) == [("queued", 0.0, 0.0), ("thinking", 0.0, 2.0)]


def test_breaks_that_the_server_told_take_the_place_of_the_stall_they_explain():
    token_s = [10.0, 10.1, 10.2, 12.0, 12.1, 12.2, 14.0, 14.1]
    told = record(token_s, 4)
    told.sent_s = 10.05
    # Seconds after it was sent; the last two are cut to the time between first and last token.
    told.breaks = [Break("paused", 0.25, 1.85), Break("moved", -1.0, 0.0), Break("moved", 4.0, 9.0)]
    assert shown(segments(told, end_s=20.0)) == [
        ("moved", 0.0, 0.05),
        ("thinking", 0.05, 0.3),
        ("paused", 0.3, 1.9),
        ("thinking", 1.9, 2.0),
        ("answering", 2.0, 2.2),
        ("stalled", 2.2, 4.0),
        ("answering", 4.0, 4.05),
        ("moved", 4.05, 4.1),
    ]


def test_a_request_without_a_token_is_queued_to_the_end():
    assert shown(segments(record([], 0, error="x"), end_s=25.0)) == [("queued", 0.0, 15.0)]


def test_the_sample_spans_the_thinking_lengths_and_needs_no_more_than_there_are():
    items = [Item(0.0, 8, thinking, 1) for thinking in (50, 10, 40, 20, 30)]
    assert sample(items, 3) == [1, 4, 0]
    assert sample(items, 9) == [1, 3, 4, 2, 0]


def test_details_keep_every_request_in_order():
    items = [Item(10.0, 8, 2, 1), Item(10.0, 8, 5, 1)]
    seen = details([record([11.0, 11.0, 11.0, 12.5], 3), record([], 0, error="gone")], items)
    assert seen["ttfos"] == [pytest.approx(2.5), None]
    assert [t["request"] for t in seen["timelines"]] == [0, 1]
    assert [t["error"] for t in seen["timelines"]] == [None, "gone"]
    assert seen["timelines"][1]["segments"] == [["queued", 0.0, 2.5]]
