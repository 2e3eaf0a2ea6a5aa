"""The calibration of forecasts: what it counts, and that looking on changes nothing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from pascal_sglang.policy.forecast_errors import OUTCOMES
from pascal_sglang.sim.__main__ import main
from pascal_sglang.sim.arms import ARMS
from pascal_sglang.sim.cluster import simulate
from pascal_sglang.sim.experiments import calibration
from pascal_sglang.sim.workload import draw

HARDWARE = "r1-qwen-32b-h100"


@pytest.fixture(scope="module")
def task():
    *_, last = calibration.tasks("arena-hard", HARDWARE, 1, ARMS["pascal"], 1, 80)
    return last


@pytest.fixture(scope="module")
def cluster(task):
    found = calibration.CalibrationCluster(task)
    found.outcome = found.run()
    return found


def test_forecasting_changes_nothing(task, cluster):
    load = draw(task.source, task.requests, task.rate, task.seed, task.shape)
    alone = simulate(task.setup, task.arm, load)
    np.testing.assert_allclose(cluster.outcome.first_answer, alone.first_answer, rtol=1e-9)
    np.testing.assert_allclose(cluster.outcome.finished, alone.finished, rtol=1e-9)


def test_every_answer_counts_once_a_row(cluster):
    for counts in cluster.counts.values():
        assert sum(counts[outcome] for outcome in OUTCOMES) <= 80
    inside = sum(counts["inside"] for counts in cluster.counts.values())
    every = sum(counts[o] for counts in cluster.counts.values() for o in OUTCOMES)
    assert 0.6 < inside / every < 1


def test_a_budget_tells_the_length_and_the_range_still_holds():
    """What is open then is the speed alone; the range of lengths alone holds next to nothing."""
    *_, task = calibration.tasks("arena-hard", HARDWARE, 1, ARMS["pascal"], 1, 80, budgets=1.0)
    cluster = calibration.CalibrationCluster(task)
    cluster.run()

    def inside(counts):
        found = sum(counts.values(), Counter())
        return found["inside"] / sum(found[outcome] for outcome in OUTCOMES)

    assert inside(cluster.counts) > 0.5
    assert inside(cluster.naive.counts) < 0.3


def test_thoughts_are_learnt(cluster):
    learnt = sum(each.forecaster.thinking.learnt for each in cluster.watched.values())
    assert learnt == 80


def test_sglangs_own_order_is_not_forecast(task):
    with pytest.raises(ValueError, match="SGLang's own scheduling is not forecast"):
        calibration.CalibrationCluster(dataclasses.replace(task, arm=ARMS["sglang"]))


def test_the_command_prints_a_table(capsys):
    assert main("calibration --requests 20 --seeds 1 --processes 1".split()) == 0
    out = capsys.readouterr().out
    assert "== arena-hard, load 1.3, pascal: 1 seeds" in out
    assert "naive inside %" in out


def test_bursts_may_be_asked_for(capsys):
    command = "calibration --requests 20 --seeds 1 --processes 1 --burst".split()
    assert main([*command, "2,60"]) == 0
    assert "== arena-hard, load 1.3, pascal: 1 seeds" in capsys.readouterr().out
    for wrong in ("2", "2,0", "2,60,1", "a,b"):
        with pytest.raises(SystemExit):
            main([*command, wrong])
