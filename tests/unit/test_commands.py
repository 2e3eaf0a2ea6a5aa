"""Every command of the README: help costs no server, and what is missing ends in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from evals import compare, page, workload
from evals.bench import agreement, pair, simulated
from evals.gpu import check
from pascal_sglang.sim import __main__ as sim

ROOT = Path(__file__).parents[2]
LIVE = str(ROOT / "evals" / "arms" / "live.toml")
HELPFUL = (
    "evals.accuracy evals.bench.agreement evals.bench.blocking evals.compare "
    "evals.bench.controllers evals.bench.controller_scale evals.bench.copy_cost "
    "evals.bench.forecast_cost evals.bench.forecasts evals.gpu.check evals.gpu.kit evals.page "
    "evals.bench.placement_cost evals.bench.policy_cost evals.serving evals.bench.simulated "
    "evals.bench.tenants evals.workload launch.monitoring.dashboard pascal_sglang.plugin "
    "pascal_sglang.sim"
).split()
# In one process, so that what they share is imported once.
HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv[:] = [name, "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(name, run_name="__main__")
        code = None
    except SystemExit as end:
        code = end.code
    if code or "usage:" not in said.getvalue():
        sys.exit(f"{name}: {code}")
sys.exit("sglang was imported" if "sglang" in sys.modules else 0)
"""


def test_help_of_every_command():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP, *HELPFUL],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (agreement.main, ["gone.toml"]),
        (compare.main, ["gone.toml"]),
        (page.main, ["gone.json"]),
        (sim.main, ["run", "gone"]),
        (sim.main, ["run", "tiny-live", "--cost", "gone.json"]),
        (simulated.main, ["gone.toml"]),
        (simulated.main, [LIVE, "--again", "gone.json", "--out", "{folder}/x.json"]),
        (workload.main, ["gone"]),
    ],
)
def test_what_is_missing_is_one_line(main, arguments, tmp_path, capsys):
    assert main([each.format(folder=tmp_path) for each in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (check.main, ["--out", "{file}/x"]),
        (compare.main, [LIVE, "--out", "{file}/x/y.json"]),
        (sim.main, ["run", "tiny-live", "--out", "{file}/x.json"]),
        (simulated.main, [LIVE, "--out", "{file}/x.json"]),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_the_run(
    main, arguments, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as refused:
        main([each.format(file=file) for each in arguments])
    assert refused.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --out: " in last
    assert str(file) in last


def test_a_server_that_does_not_start_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, pair.one_line_errors():
        raise pair.ArmError("server ended at start")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "evals: error: server ended at start\n"
