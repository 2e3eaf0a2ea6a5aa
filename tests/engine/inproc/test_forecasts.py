"""Forecasts of a real scheduler under pressure: what it learns and what it shows."""

from pascal_sglang.cluster.forecast_files import FOLDER_ENV, ForecastFiles
from tests.engine.inproc.bed import Request, run
from tests.engine.inproc.watch import lines
from tests.requests import thinking


def requests(count, budget, **ours):
    made = []
    for i in range(count):
        fields = thinking(budget + 5 * i)
        custom = {**fields["custom_params"], "pascal": ours}
        made.append(
            Request(
                ids=[97 + (7 * i + j) % 26 for j in range(20)],
                params={"max_new_tokens": budget + 5 * i + 20, "custom_params": custom},
                options={
                    "require_reasoning": True,
                    "custom_logit_processor": fields["custom_logit_processor"],
                },
            )
        )
    return made


def test_a_scheduler_under_pressure_forecasts(tiny_model, tmp_path):
    found = run(
        tiny_model,
        requests(24, 150, eta_comments=True),
        {"quantum_tokens": 50},
        ["--max-total-tokens", "1500"],
        each_pass="tests.engine.inproc.watch:forecasts",
        **{FOLDER_ENV: str(tmp_path)},
    )
    assert sum(found.pauses.values()) > 0
    forecast = found.status["forecast"]
    assert forecast["errors"] == 0
    assert forecast["token_s"] > 0
    assert forecast["thoughts_learnt"] == 0, "a budget that ends them says nothing of their length"
    assert 0 < forecast["ttfo_s"]["p10"] <= forecast["ttfo_s"]["p50"] <= forecast["ttfo_s"]["p90"]
    (shown,) = ForecastFiles(tmp_path, lambda: ["live"]).shown().values()
    estimate = shown.arrival.estimate(20)
    assert 0 < estimate.p10 <= estimate.p50 <= estimate.p90
    assert shown.thinking["P75"] <= shown.thinking["P90"]
    seen = lines(found)
    ranges = [each for line in seen for each in line["ranges"]]
    assert len(ranges) > 24, "requests were forecast, some more than once"
    assert all(0 <= low <= half <= high for low, half, high in ranges)
    assert max(line["waits_s"] for line in seen) > 0, "memory was short"
    outcomes = forecast["outcomes"]
    assert sum(sum(counts.values()) for counts in outcomes.values()) > 0


def test_who_is_refused_is_not_expected_again(tiny_model):
    """Else refusals, which cost nothing, would look like a load, and others be refused for it."""
    ids = [97] * 20
    refused = Request(ids=ids, options={"return_logprob": True, "logprob_start_len": 10**6})
    found = run(
        tiny_model,
        [*requests(3, 10), *[refused] * 20],
        {"quantum_tokens": 50},
        ["--max-total-tokens", "1500"],
        each_pass="tests.engine.inproc.watch:arrivals",
    )
    assert [reason["type"] for reason in found.finish] == ["length"] * 3 + ["abort"] * 20
    assert 2.9 < max(line["arrived"] for line in lines(found)) <= 3


def test_fcfs_makes_no_forecasts(tiny_model, tmp_path):
    found = run(
        tiny_model,
        requests(2, 10),
        {"policy": "fcfs"},
        ["--max-total-tokens", "1500"],
        **{FOLDER_ENV: str(tmp_path)},
    )
    assert found.status["forecast"] is None
    assert list(tmp_path.iterdir()) == []
