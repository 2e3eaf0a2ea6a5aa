"""The simulator agrees with what was measured; the file of a measurement can be used again."""

import json
from pathlib import Path

import pytest

from evals.bench import simulated

ROOT = Path(__file__).parents[2]
PLAN = str(ROOT / "evals/arms/simulated.toml")
MEASURED = ROOT / "evals/results/simulated.json"


def test_the_simulator_agrees_with_the_live_servers(tmp_path, capsys):
    out = tmp_path / "again.json"
    assert simulated.main([PLAN, "--again", str(MEASURED), "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    errors = {
        name: [
            abs(run["simulated"][name] / run["live"][name] - 1)
            for arm in told["arms"].values()
            for run in arm["runs"]
        ]
        for name in simulated.FIGURES
    }
    for name, each in errors.items():
        assert sum(each) / len(each) < 0.08, name
        assert max(each) < 0.25, name
    shown = capsys.readouterr().out
    assert "ttfo: mean error" in shown
    assert "pascal" in shown


@pytest.mark.parametrize("text", ["no json", '{"arms": {"rr": {}}}'])
def test_a_file_that_is_no_measurement_is_one_line(tmp_path, capsys, text):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    out = str(tmp_path / "out.json")
    assert simulated.main([PLAN, "--again", str(bad), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
