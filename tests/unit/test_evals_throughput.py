"""Rates, peaks and token intervals against runs written by hand; seconds."""

import pytest

from evals.load.record import Idle, Record
from evals.reporting import report
from evals.reporting.metrics import intervals, measure, meets, summarize
from evals.reporting.throughput import throughput
from evals.workload import Item

ITEMS = [Item(0.0, 10, 1, 2), Item(1.0, 20, 1, 2), Item(4.0, 30, 1, 2)]
RECORDS = [
    Record(0.0, 0.0, [0.5, 1.0, 1.5, 2.0], 2, True),
    Record(1.0, 1.0, [1.2, 1.4, 1.6, 4.0], 2, True),
    Record(4.0, 4.0, [4.5, 5.0], 2, False, "stream ended early"),
]


def test_rates_count_from_the_first_arrival_to_the_last_token():
    seen = throughput(RECORDS, ITEMS)
    assert seen["duration"] == 5.0
    assert seen["request_throughput"] == pytest.approx(2 / 5)
    assert seen["input_throughput"] == pytest.approx(60 / 5)
    assert seen["output_throughput"] == pytest.approx(10 / 5)
    assert seen["total_throughput"] == pytest.approx(70 / 5)
    assert seen["concurrency"] == pytest.approx((2.0 + 3.0) / 5)


def test_peaks_count_whole_seconds_and_requests_open_together():
    seen = throughput(RECORDS, ITEMS)
    # In second 1: 1.0, 1.5 of the first and 1.2, 1.4, 1.6 of the second.
    assert seen["max_output_tokens_per_s"] == 5.0
    assert seen["max_concurrent_requests"] == 2


def test_a_request_that_starts_as_another_ends_does_not_overlap_it():
    records = [Record(0.0, 0.0, [1.0], 0, True), Record(1.0, 1.0, [2.0], 0, True)]
    assert throughput(records, ITEMS[:2])["max_concurrent_requests"] == 1


def test_without_a_token_every_rate_is_zero():
    seen = throughput([Record(0.0, error="HTTP 500: no")], ITEMS[:1])
    assert (seen["output_throughput"], seen["max_concurrent_requests"]) == (0.0, 0)


def test_an_events_gap_is_shared_by_its_tokens_and_the_first_event_has_none():
    assert intervals([1.0, 1.0, 2.0, 3.0, 3.0]) == pytest.approx([1.0, 0.5, 0.5])
    assert intervals([1.0]) == []
    assert intervals([]) == []


def test_pace_of_all_tokens_and_its_objective():
    item = Item(0.0, 10, 1, 2)
    seen = measure(RECORDS[0], item, None, 1.0)
    assert seen.tpot_s == pytest.approx(0.5)
    assert seen.slowdown is None
    assert meets(seen, {"tpot": 501})
    assert not meets(seen, {"tpot": 499})
    assert meets(measure(Record(0.0, 0.0, [1.0], 0, True), item, None, 1.0), {"tpot": 1})


def test_goodput_says_how_many_met_each_objective():
    seen = summarize(
        RECORDS,
        ITEMS,
        idle=Idle(0.5, 0.1),
        target_tpot_s=1.0,
        edges=[],
        goodput_ms={"ttft": 300, "e2el": 2500},
    )
    assert seen["slo_attainment"] == 0.0
    assert seen["slo_attainment_by_metric"] == {
        "ttft": pytest.approx(1 / 3),
        "e2el": pytest.approx(1 / 3),
    }
    text = report.lines(
        seen, "t", [], head=[("Backend:", "sglang")], counters={"a_total": 3.0, "b_sum": 2.5}
    )
    assert text[1] == f"{'Backend:':<40} sglang"
    assert f"{'TTFT SLO attainment (%):':<40} 33.33" in text
    assert f"{'a_total:':<40} 3" in text
    assert not any(line.startswith("b_sum") for line in text)
    assert f"{'Mean TPOT (ms):':<40} 644.44" in text
    assert seen["std_ttft_ms"] == pytest.approx(141.42, abs=0.01)
