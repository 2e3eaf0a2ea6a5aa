"""Ratios, verdicts and plans, without any server."""

from pathlib import Path

import pytest

from evals import compare
from evals.arms import TARGETS, Arm, Rate, command_line, load_plan, processor_of
from evals.load.remote import parse_counters
from evals.load.server import ArmError
from evals.reporting import verdict
from evals.reporting.verdict import Run

LIVE = Path(__file__).parents[2] / "evals" / "arms" / "live.toml"
HIGH = Rate("high", 5.0)
OURS = Arm(name="pascal", command="pascal", role="candidate")
MEAN_TTFO = verdict.key("mean_ttfo_ms")


def run(arm, seed=0, rate="high", tokens=(4, 5), **figures):
    summary = {
        "mean_ttfo_ms": 1000.0,
        "p99_slowdown": 10.0,
        "tail_ttfo_by_bin": [2.0, 4.0],
        "output_throughput": 100.0,
        "slo_violations": 0.0,
        "failed": 0,
        "no_answer": 0,
        **figures,
    }
    return Run(arm, rate, seed, summary, list(tokens))


def judge(runs, rate=HIGH, targets=TARGETS):
    lines = verdict.verdict(runs, OURS, rate, ["fcfs", "priority"], 2, targets)
    return {line.name: line.passed for line in lines}


def test_a_plan_names_its_own_targets():
    runs = [run("fcfs"), run("pascal", mean_ttfo_ms=1015.0, output_throughput=99.0)]
    ample = load_plan(LIVE.with_name("ample.toml")).targets
    assert judge(runs, targets=ample) == {
        "every request answered": True,
        "mean TTFO <= 1.02x": True,
        "throughput >= 0.98x": True,
    }
    runs[1].summary["mean_ttfo_ms"] = 1030.0
    assert judge(runs, targets=ample)["mean TTFO <= 1.02x"] is False


def test_loads_follow_the_machine():
    plan = load_plan(LIVE)
    faster = plan.scaled_to(1.5 * plan.sustained_per_s)
    assert [r.per_s for r in faster.rates] == [round(1.5 * r.per_s, 2) for r in plan.rates]
    assert [r.overload for r in faster.rates] == [r.overload for r in plan.rates]
    again = faster.scaled_to(plan.sustained_per_s)
    assert [r.per_s for r in again.rates] == pytest.approx([r.per_s for r in plan.rates], abs=0.01)


def test_unequal_prompts_leave_out_what_does_not_fit():
    plan = load_plan(LIVE.with_name("unequal.toml"))
    for seed in range(plan.seeds):
        items = plan.items(2.0, seed)
        prompts = sorted(item.prompt_tokens for item in items)
        assert max(i.prompt_tokens + i.output_tokens for i in items) <= plan.shape.fits
        assert plan.shape.fits < plan.kv_tokens
        assert 0.9 * plan.requests < len(items) < plan.requests
        assert prompts[-1] > 15 * prompts[len(prompts) // 2]


def test_bursts_begin_together_and_come_three_times():
    plan = load_plan(LIVE.with_name("bursts.toml"))
    on_s, off_s = plan.shape.burst_s
    # Where stock sustains four requests a second.
    times_s = [item.arrival_s for item in plan.items(4.0 * plan.rates[0].per_s, 0)]
    assert len({int(at // (on_s + off_s)) for at in times_s}) >= 3
    assert max(at % (on_s + off_s) for at in times_s) < on_s


def test_a_shape_that_no_live_load_has_is_refused(tmp_path, capsys):
    plan, text = tmp_path / "plan.toml", LIVE.with_name("bursts.toml").read_text()
    for shape, said in (("programs = 0.5", "no programs"), ("bursts = 1", "bursts")):
        plan.write_text(text.replace("burst_s = [10, 10]", shape))
        assert compare.main([str(plan), "--out", str(tmp_path / "out.json")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_arms_that_are_up_together_take_turns_run_by_run(monkeypatch, tmp_path):
    up, ran = [], []

    class Running:
        def __init__(self, arm):
            self.name = arm.name

        def __enter__(self):
            if self.name == "priority":
                raise ArmError("no room")
            up.append(self.name)
            return self

        def __exit__(self, *_):
            up.remove(self.name)

    def run_once(comparison, arm, rate, seed, server, target):
        assert server.name == arm.name
        assert set(up) == {"fcfs", "pascal", "oracle"}
        ran.append((seed, rate.name, arm.name))

    monkeypatch.setattr(compare, "serve", lambda arm, *_: Running(arm))
    monkeypatch.setattr(compare.arms, "model_folder", lambda *_: tmp_path)
    monkeypatch.setattr(compare.arms, "logit_processor", lambda *_: "")
    monkeypatch.setattr(compare.Comparison, "prepare", lambda *_: None)
    monkeypatch.setattr(compare.Comparison, "run_once", run_once)
    names = ["fcfs", "priority", "pascal", "oracle"]
    plan = load_plan(LIVE, arms=names, rates=["medium", "high"], seeds=2)
    comparison = compare.Comparison(plan, tmp_path / "x.json", verbose=False, together=True)
    comparison.run_all()
    order = [
        (seed, rate, arm)
        for seed in range(2)
        for rate in ("medium", "high")
        for arm in ("fcfs", "pascal", "oracle")
    ]
    assert ran == order
    assert up == []
    assert comparison.failures == {"priority": "no room"}


def test_an_unknown_target_is_refused(tmp_path):
    plan = tmp_path / "plan.toml"
    text = LIVE.with_name("ample.toml").read_text()
    plan.write_text(text.replace("mean_ttfo = 1.02", "mean_ttfoo = 1.02"))
    with pytest.raises(ArmError, match="mean_ttfoo"):
        load_plan(plan)


def test_ratios_are_per_seed_and_averaged_geometrically():
    runs = [
        run("fcfs", 0, mean_ttfo_ms=1000.0),
        run("fcfs", 1, mean_ttfo_ms=2000.0),
        run("fcfs", 2, mean_ttfo_ms=9000.0),
        run("pascal", 0, mean_ttfo_ms=250.0),
        run("pascal", 1, mean_ttfo_ms=2000.0),
    ]
    seen = verdict.ratio(runs, "pascal", "fcfs", "high", MEAN_TTFO)
    assert seen.point == pytest.approx(0.5)
    assert (seen.low, seen.high) == (0.25, 1.0)
    assert str(seen) == "0.50 (0.25..1.00)"


def test_ratios_without_data_are_none():
    runs = [run("fcfs"), run("pascal", mean_ttfo_ms=None)]
    assert verdict.ratio(runs, "pascal", "fcfs", "high", MEAN_TTFO) is None
    assert verdict.ratio(runs, "fcfs", None, "high", MEAN_TTFO) is None
    assert verdict.ratio(runs, "fcfs", "fcfs", "low", MEAN_TTFO) is None
    assert verdict.ratio(runs, "fcfs", "fcfs", "high", verdict.key("slo_violations")) is None


def test_the_best_stock_arm_is_chosen_per_figure():
    runs = [
        run("fcfs", mean_ttfo_ms=900.0, output_throughput=90.0),
        run("priority", mean_ttfo_ms=1000.0, output_throughput=110.0),
    ]
    arms = ["fcfs", "priority"]
    throughput = verdict.key("output_throughput")
    assert verdict.best(runs, arms, "high", MEAN_TTFO) == "fcfs"
    assert verdict.best(runs, arms, "high", throughput, higher=True) == "priority"
    assert verdict.best(runs, [], "high", MEAN_TTFO) is None


def test_gap_closure():
    assert verdict.gap_closure(stock=10.0, arm=4.0, oracle=2.0) == pytest.approx(0.75)
    assert verdict.gap_closure(stock=10.0, arm=12.0, oracle=2.0) == pytest.approx(-0.25)
    assert verdict.gap_closure(stock=2.0, arm=1.0, oracle=2.0) is None
    assert verdict.gap_closure(stock=2.0, arm=1.0, oracle=1.95) is None


def test_gap_closed_starts_at_the_best_stock_arm():
    runs = [
        run("fcfs", mean_ttfo_ms=1100.0),
        run("priority", mean_ttfo_ms=1000.0),
        run("pascal", mean_ttfo_ms=400.0),
        run("oracle", mean_ttfo_ms=200.0),
    ]
    stock = ["fcfs", "priority"]
    seen = verdict.gap_closed(runs, "pascal", stock, "oracle", "high")
    assert seen == pytest.approx(0.75)
    assert verdict.gap_closed(runs, "pascal", stock, None, "high") is None
    assert verdict.gap_closed(runs, "rr", stock, "oracle", "high") is None


def test_arms_must_agree_on_tokens_per_item():
    same = [run("fcfs"), run("pascal"), run("fcfs", 1, tokens=(7, 7))]
    assert verdict.token_mismatches(same) == []
    (wrong,) = verdict.token_mismatches([*same, run("rr", tokens=(4, 6))])
    assert "rr and fcfs differ on 1 items, first 1" in wrong


def test_a_verdict_that_passes_and_one_that_fails():
    stock = [run("fcfs"), run("priority", mean_ttfo_ms=1100.0)]
    good = run(
        "pascal",
        mean_ttfo_ms=590.0,
        p99_slowdown=3.4,
        tail_ttfo_by_bin=[0.5, 5.0],
        output_throughput=98.0,
        slo_violations=0.01,
    )
    assert set(judge([*stock, good]).values()) == {True}
    bad = run(
        "pascal",
        mean_ttfo_ms=610.0,
        p99_slowdown=3.6,
        tail_ttfo_by_bin=[0.6, 5.3],
        output_throughput=96.0,
        slo_violations=0.02,
        no_answer=1,
    )
    assert set(judge([*stock, bad]).values()) == {False}


def test_overload_is_judged_against_round_robin():
    overload = Rate("high", 9.0, overload=True)
    name = "SLO violations no more than rr"
    runs = [run("fcfs"), run("pascal", slo_violations=0.05)]
    assert judge(runs, overload)[name] is None
    assert judge([*runs, run("rr", slo_violations=0.05)], overload)[name] is True
    assert judge([*runs, run("rr", slo_violations=0.04)], overload)[name] is False


def test_missing_arms_are_not_judged():
    passed = judge([run("pascal")])
    assert passed["mean TTFO <= 0.6x"] is None
    assert passed["every request answered"] is True


def test_the_plan_of_live_and_its_parts():
    plan = load_plan(LIVE)
    assert [arm.name for arm in plan.arms if arm.role == "stock"] == ["fcfs", "priority"]
    assert [arm.name for arm in plan.arms if arm.role == "oracle"] == ["oracle"]
    assert sum(rate.overload for rate in plan.rates) == 1
    part = load_plan(LIVE, quick=True, arms=["pascal", "fcfs"], requests=7)
    assert [arm.name for arm in part.arms] == ["fcfs", "pascal"]
    assert [rate.name for rate in part.rates] == ["medium", "high", "overload"]
    assert (part.seeds, part.requests) == (1, 7)


def test_command_lines_of_live():
    plan = load_plan(LIVE)
    lines = {arm.name: command_line(arm, plan, Path("m"))[1:] for arm in plan.arms}
    assert lines["fcfs"][:4] == ["-m", "sglang.launch_server", "--model-path", "m"]
    assert lines["pascal"][:2] == ["-m", "pascal_sglang.launch_server"]
    pace = lines["pascal"].index("--pascal-answer-tpot-ms") + 1
    assert float(lines["pascal"][pace]) == plan.target_tpot_ms
    capacity = lines["oracle"].index("--max-total-tokens") + 1
    assert int(lines["oracle"][capacity]) > plan.kv_tokens
    for name in ("fcfs", "priority", "oracle"):
        assert not any(flag.startswith("--pascal") for flag in lines[name])


def test_drafts_have_a_head_beside_the_model_and_no_processor():
    plan = load_plan(LIVE.with_name("eagle.toml"))
    for arm in plan.arms:
        line = command_line(arm, plan, Path("x/tiny"))
        assert line[line.index("--speculative-draft-model-path") + 1] == "x/tiny-eagle"
    assert processor_of(plan) == ""


def test_bad_plans_are_refused():
    with pytest.raises(ArmError, match="no such arm: nobody"):
        load_plan(LIVE, arms=["nobody"])
    with pytest.raises(ArmError, match="command must be one of"):
        Arm(name="x", command="docker", role="stock")
    with pytest.raises(ArmError, match="role must be one of"):
        Arm(name="x", command="stock", role="winner")


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("per_s = 5.0", "per_s = -5.0", "rate high: per_s must be positive, not -5.0"),
        ("requests = 100", "requests = 0", "requests must be positive, not 0"),
        ("[[rate]]", "[[other]]", "nothing under rate"),
        ('preset = "tiny-live"', 'preset = "nope"', "no source 'nope'"),
        ("bins = 4", "bins = 4 4", "line 11"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_in_one_line(was, becomes, said, tmp_path, capsys):
    plan, text = tmp_path / "plan.toml", LIVE.read_text()
    assert was in text
    plan.write_text(text.replace(was, becomes))
    assert compare.main([str(plan), "--out", str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_counters_are_summed_over_labels_that_do_not_say_what_happened():
    text = "\n".join(
        (
            "# TYPE pascal:pauses counter",
            'pascal:paused_kv_total{dp_rank="0",tier="host",model="a b"} 3.0',
            'pascal:paused_kv_total{dp_rank="1",tier="host",model="a b"} 4.0',
            'pascal:paused_kv_total{dp_rank="0",tier="recompute",model="a b"} 2.0',
            'pascal:starts_total{class="x",status="waiting"} 6.0',
            'pascal:starts_total{class="y",status="host"} 1.0',
            'pascal:ttfo_seconds_bucket{le="1.0"} 9.0',
            "pascal:ttfo_seconds_sum 1.5",
            "sglang:num_retracted_requests_total 4.0",
            "sglang:num_retracted_reqs 1.0",
            "sglang:generation_tokens_total 99.0",
        )
    )
    assert parse_counters(text) == {
        'pascal:paused_kv_total{tier="host"}': 7.0,
        'pascal:paused_kv_total{tier="recompute"}': 2.0,
        "pascal:starts_total": 7.0,
        "pascal:ttfo_seconds_sum": 1.5,
        "sglang:num_retracted_requests_total": 4.0,
    }
