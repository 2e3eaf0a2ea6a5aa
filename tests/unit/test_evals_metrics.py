"""Figures against timelines worked out by hand; times in seconds."""

import math

import pytest

from evals.load.record import Idle, Record, fit_idle
from evals.reporting import report
from evals.reporting.metrics import bin_edges, measure, meets, qoe, summarize, tail, ttfo_by_bin
from evals.workload import Item

IDLE = Idle(t0_s=0.5, per_token_s=0.1)
ITEM = Item(arrival_s=10.0, prompt_tokens=8, thinking_tokens=2, answer_tokens=3)


def record(token_s, reasoning=3, *, arrival_s=10.0, finished=True, error=None):
    return Record(arrival_s, arrival_s, list(token_s), reasoning, finished, error)


def test_an_answer_at_or_ahead_of_the_pace_is_perfect():
    assert qoe([5.0, 6.0, 7.0], 1.0) == 1.0
    assert qoe([5.0, 5.0, 5.0, 5.0], 1.0) == 1.0
    assert qoe([5.0], 1.0) == 1.0


def test_a_pause_that_outlasts_the_buffer_costs_its_area():
    # ideal 0 1 2 3; shown 0 1 4 5; end 6. Delay 2 + 2, whole 6 + 5 + 4 + 3.
    assert qoe([0.0, 0.0, 4.0, 4.0], 1.0) == pytest.approx(1 - 4 / 18)


def test_a_pause_within_the_buffer_costs_nothing():
    assert qoe([0.0, 0.0, 0.0, 0.0, 0.0, 4.9], 1.0) == 1.0


def test_an_answer_at_half_the_pace():
    # ideal 0 1 2; shown 0 2 4; end 5. Delay 1 + 2, whole 5 + 4 + 3.
    assert qoe([0.0, 2.0, 4.0], 1.0) == pytest.approx(1 - 3 / 12)


def test_qoe_ignores_when_the_answer_began():
    late = qoe([100.0, 102.0, 104.0], 1.0)
    assert late == pytest.approx(qoe([0.0, 2.0, 4.0], 1.0))


def test_qoe_stays_in_range_and_needs_an_answer():
    assert qoe([], 1.0) is None
    assert 0.0 <= qoe([0.0, 1e9], 1e-3) < 0.51


def test_figures_of_one_request():
    # Two thinking tokens, the end marker, three answering tokens.
    seen = measure(record([11.0, 11.5, 12.0, 12.4, 13.0, 14.4]), ITEM, IDLE, 1.0)
    assert seen.ttft_s == pytest.approx(1.0)
    assert seen.reasoning_s == pytest.approx(1.0)
    assert seen.ttfo_s == pytest.approx(2.4)
    assert seen.answer_tpot_s == pytest.approx(1.0)
    assert seen.e2e_s == pytest.approx(4.4)
    assert seen.slowdown == pytest.approx(2.4 / 0.7)
    assert seen.qoe == 1.0
    assert not seen.violates


def test_a_request_that_never_answers_violates():
    for reasoning in (3, 4):
        seen = measure(record([11.0, 11.5, 12.0], reasoning), ITEM, IDLE, 1.0)
        assert not seen.answered
        assert (seen.ttfo_s, seen.reasoning_s, seen.qoe, seen.slowdown) == (None,) * 4
        assert seen.violates


def test_an_answer_cut_off_violates_however_fast_it_was():
    cut = record([11.0, 11.1, 11.2, 11.3], finished=False, error="timeout (request)")
    seen = measure(cut, ITEM, IDLE, 1.0)
    assert seen.qoe == 1.0
    assert seen.violates
    assert seen.e2e_s is None


def test_the_threshold_is_below_not_at():
    # Twenty tokens, one of them late at the end by x: 1 - x / (210 + 20 x) for a pace of one.
    def last_late(x):
        return measure(record([10.0] * 3 + [11.0] * 19 + [30.0 + x]), ITEM, IDLE, 1.0)

    assert last_late(1.0).qoe == pytest.approx(1 - 1 / 230)
    assert not last_late(1.0).violates


@pytest.mark.parametrize(
    ("count", "percent"), [(10, 90), (29, 90), (30, 95), (99, 95), (100, 99), (500, 99)]
)
def test_tail_takes_the_percentile_the_sample_supports(count, percent):
    assert tail(list(range(count))) == pytest.approx((count - 1) * percent / 100)


def test_tail_of_few_is_their_maximum():
    assert tail([3.0, 9.0, 1.0]) == 9.0
    assert tail([float(i) for i in range(9)]) == 8.0
    assert tail([]) is None


def test_bins_split_evenly_and_an_edge_belongs_below():
    edges = bin_edges([1, 2, 3, 4, 5, 6, 7, 8, 9], 2)
    assert edges == [5.0]
    seen = [
        measure(
            record([0.0] * 3 + [ttfo], arrival_s=0.0),
            Item(0.0, 8, thinking, 1),
            IDLE,
            1.0,
        )
        for thinking, ttfo in ((5, 1.0), (6, 2.0), (1, 3.0))
    ]
    assert ttfo_by_bin(seen, edges) == [[1.0, 3.0], [2.0]]
    assert bin_edges([4, 4, 4, 4], 4) == [4.0]
    assert report.bin_names([4.0, 9.0]) == ["<=4", "4-9", ">9"]
    assert report.bin_names([]) == ["all"]


def test_idle_fit_recovers_a_line_and_never_starts_below_zero():
    fit = fit_idle([10, 20, 40], [0.3, 0.5, 0.9])
    assert fit.t0_s == pytest.approx(0.1)
    assert fit.per_token_s == pytest.approx(0.02)
    assert fit_idle([10, 20], [0.1, 0.3]).t0_s == 0.0


def test_goodput_counts_who_meets_every_bound():
    seen = measure(record([11.0, 11.5, 12.0, 12.4, 13.0, 14.4]), ITEM, IDLE, 1.0)
    assert meets(seen, {"ttfo": 2401, "answer_tpot": 1001})
    assert not meets(seen, {"ttfo": 2399, "answer_tpot": 1001})
    single = measure(record([11.0, 11.5, 12.0, 12.4]), ITEM, IDLE, 1.0)
    assert meets(single, {"answer_tpot": 1})
    assert not meets(measure(record([11.0]), ITEM, IDLE, 1.0), {"ttfo": 1e9})


def test_summary_of_three_requests():
    items = [Item(0.0, 5, 1, 2), Item(1.0, 7, 1, 2), Item(2.0, 9, 1, 2)]
    records = [
        Record(0.0, 0.0, [0.5, 1.0, 1.5, 2.5], 2, True),
        Record(1.0, 1.0, [2.0, 3.0], 2, False, "timeout (run)"),
        Record(2.0, None, [], 0, False, "HTTP 503: busy"),
    ]
    seen = summarize(
        records, items, idle=IDLE, target_tpot_s=1.0, edges=[5.0], goodput_ms={"ttfo": 2000}
    )
    assert (seen["completed"], seen["failed"], seen["no_answer"]) == (1, 2, 2)
    assert seen["errors"] == ["HTTP 503: busy", "timeout (run)"]
    assert seen["duration"] == 3.0
    assert seen["output_throughput"] == pytest.approx(6 / 3)
    # Up to the last arrival at 2.0: three tokens of the first request, one of the second.
    assert seen["window_output_throughput"] == pytest.approx(4 / 2)
    assert (seen["reasoning_tokens"], seen["answer_tokens"]) == (4, 2)
    assert seen["request_goodput"] == pytest.approx(1 / 3)
    assert seen["slo_violations"] == pytest.approx(2 / 3)
    assert seen["mean_ttfo_ms"] == pytest.approx(1500)
    assert seen["mean_ttft_ms"] == pytest.approx(750)
    assert seen["mean_answer_itl_ms"] == pytest.approx(1000)
    assert seen["mean_blocking_ms"] == pytest.approx(500), "1.0 to 1.5; the other never answered"
    assert seen["bin_requests"] == [1, 0]
    assert seen["tail_ttfo_by_bin"] == [1.5, None]


def test_the_report_shows_a_run_without_any_token():
    seen = summarize(
        [Record(0.0, error="HTTP 500: no")],
        [ITEM],
        idle=IDLE,
        target_tpot_s=1.0,
        edges=[],
    )
    text = report.lines(seen, "nothing", [])
    assert "Mean TTFO (ms):                          n/a" in text
    assert "error: HTTP 500: no" in text
    assert "failed 1" in report.short(seen)
    assert not math.isnan(seen["output_throughput"])


def test_report_lines_are_forty_wide_with_two_decimals():
    assert report.line("Mean TTFO (ms):", 12.345) == f"{'Mean TTFO (ms):':<40} 12.35"
    assert report.line("Successful requests:", 7) == f"{'Successful requests:':<40} 7"
