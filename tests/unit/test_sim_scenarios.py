"""Scenarios: every file is one, ratios and verdicts are right, and a page shows them."""

import html
import json

import pytest

from evals import page
from pascal_sglang.sim.__main__ import main
from pascal_sglang.sim.arms import ARMS
from pascal_sglang.sim.experiments import scenarios
from pascal_sglang.sim.experiments.provenance import commit
from pascal_sglang.sim.workload import SOURCES

# Load shares of every regime that a policy has to prove itself in.
REGIMES = {
    "arena-hard": {1.0, 1.3},
    "servegen-h100-80": {0.7, 1.0},
    "servegen-h100-96": {1.0, 1.2},
    "bursts": {0.65, 0.8},
    "reasoning-heavy": {1.15},
    "mixed-readers": {1.3},
    "interactive": {2.0},
    "multi-turn": {0.8},
}
WHOLE = """
about = "a test"
source = "alpacaeval"
hardware = "r1-qwen-32b-h100"
instances = 2
seeds = 2
"""
LOAD = "[[load]]\nshare = 1.3\nrequests = 60\n"


def row(arm, seed, **figures):
    known = dict.fromkeys(scenarios.FIGURES)
    bins = {"tail_ttfo_by_bin": [None] * 7, "bin_requests": [0] * 7}
    told = {"source": "x", "load": "load 1", "slo_violations": 0.0}
    return {"arm": arm, "seed": seed, **told, **known, **bins, **figures}


def scenario(**changes):
    whole = {
        "name": "x",
        "about": "",
        "source": "alpacaeval",
        "hardware": "r1-qwen-32b-h100",
        "instances": 1,
        "loads": {1.0: 10},
    }
    return scenarios.Scenario(**{**whole, **changes})


def test_every_regime_has_its_file():
    found = {each.name: each for each in scenarios.load_all([])}
    assert {name: set(each.loads) for name, each in found.items()} == REGIMES
    for name, each in found.items():
        assert each.source in SOURCES
        assert each.seeds >= (12 if name == "servegen-h100-80" else 3)
    assert found["bursts"].targets == {"mean_ttfo": 0.88, "p99_slowdown": 0.67}
    assert found["bursts"].shape.burst_s == (200, 400)


def test_every_arm_and_seed_runs_under_every_load():
    each = scenario(loads={0.7: 10, 1.0: 20}, seeds=2)
    chosen = scenarios.arms(None)
    tasks = list(each.tasks(chosen))
    assert {arm.name for arm in chosen} == {*scenarios.COMPARED, "INF"}
    assert len({(t.arm.name, t.load, t.seed) for t in tasks}) == len(tasks) == 4 * len(chosen)
    assert tasks[-1].rate / tasks[0].rate == pytest.approx(1 / 0.7)
    assert {t.requests for t in each.tasks(chosen, requests=5)} == {5}


def test_what_all_is_compared_with_is_always_there():
    names = [arm.name for arm in scenarios.arms([ARMS["INF"], ARMS["pascal"]])]
    assert names == ["rr-restart", "pascal", "INF"]


def test_ratios_are_of_the_same_seed():
    rows = [row("rr-restart", s, mean_ttfo=v) for s, v in ((0, 10.0), (1, 40.0), (2, 5.0))]
    rows += [row("pascal", s, mean_ttfo=v) for s, v in ((1, 20.0), (0, 20.0))]
    found = scenarios.ratio(rows, "pascal", "mean_ttfo")
    assert (found.point, found.low, found.high) == pytest.approx((1.0, 0.5, 2.0))
    assert scenarios.ratio(rows, "pascal", "mean_e2e") is None


def test_the_worst_bin_needs_samples():
    def with_bins(arm, tails, counts):
        return row(arm, 0, tail_ttfo_by_bin=tails, bin_requests=counts)

    counts = [100, 100, 9, 0, 0, 0, 0]
    rows = [
        with_bins("rr-restart", [1.0, 2.0, 1.0, None, None, None, None], counts),
        with_bins("pascal", [1.1, 3.0, 9.0, None, None, None, None], counts),
    ]
    assert scenarios.worst_bin_ratio(rows, "pascal") == "1.50 (256-512)"


@pytest.mark.parametrize(
    ("figures", "targets", "failed"),
    [
        ({"mean_ttfo": 0.9, "mean_e2e": 1.1}, {}, []),
        ({"mean_ttfo": 1.01, "mean_e2e": 1.11}, {}, ["mean TTFO", "mean e2e"]),
        ({"mean_ttfo": 0.9}, {"mean_ttfo": 0.88}, ["mean TTFO"]),
        ({"mean_e2e_program": 1.03}, {}, ["mean e2e, program-read"]),
        ({"p99_slowdown": 0.7}, {"p99_slowdown": 0.67}, ["P99 slowdown"]),
        ({"slo_violations": 0.0119}, {}, []),
        ({"slo_violations": 0.0121}, {}, ["SLO violations"]),
    ],
)
def test_a_target_is_met_or_missed(figures, targets, failed):
    base = dict.fromkeys(scenarios.FIGURES, 1.0)
    rows = [
        row("rr-restart", 0, **base, slo_violations=0.05),
        row("rr", 0, **base, slo_violations=0.01),
        row("INF", 0, **base, slo_violations=0.0),
        row("pascal", 0, **figures),
    ]
    found = scenarios.verdicts(scenario(targets=targets), rows)
    missed = [each["name"].partition(" at most")[0] for each in found if not each["passed"]]
    assert missed == failed


@pytest.mark.parametrize(
    "text",
    [
        "",
        WHOLE,
        WHOLE + LOAD + "[targets]\nspeed = 1.0\n",
        WHOLE.replace("r1-qwen", "none") + LOAD,
        WHOLE + LOAD + "[shape]\nburst_s = 3\n",
        "colour = 'red'\n" + WHOLE + LOAD,
    ],
)
def test_a_file_that_is_no_scenario_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert main(["scenarios", str(path)]) == 2
    told = capsys.readouterr().err
    assert "bad.toml: no scenario" in told
    assert told.count("\n") == 1


def test_the_command_judges_and_a_page_shows_it(tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "out.json"
    path.write_text(WHOLE + LOAD + "[shape]\nprograms = 0.5\n[targets]\nmean_ttfo = 0.01\n")
    asked = ["scenarios", str(path), "--arms", "pascal,fcfs", "--processes", "1"]
    assert main([*asked, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "FAIL  pascal: mean TTFO at most 0.01x rr-restart" in shown
    assert "mean e2e, program-read" in shown
    told = json.loads(out.read_text())
    assert {r["arm"] for r in told["runs"]} == {"rr-restart", "pascal", "fcfs", "INF"}
    assert told["provenance"]["commit"] == commit()
    assert set(told["provenance"]) == {"command", "commit", "versions", "machine", "date"}
    page.write([out], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert '<span class="FAIL">FAIL: ' in text
    assert "SLO violations at most the best arm's" in html.unescape(text)
    assert told["provenance"]["date"] in text


def test_without_a_checkout_there_is_no_commit(tmp_path):
    assert commit(tmp_path) == ""
