"""`evals/gpu/check.sh` on a CPU: the real script, real servers, and results that say what ran. The
servers are forks (`tests/forks`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import forked_environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "evals" / "gpu" / "check.sh"


def check(*arguments, timeout=590, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PASCAL_PYTHON": sys.executable, **environment},
    )


def test_the_check_is_green_on_a_cpu(tmp_path):
    done = check("--device", "cpu", "--out", str(tmp_path), **forked_environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["failed"] == []
    assert "cores of" in found["device"]["device"]
    assert found["seconds"] > 0
    parts = found["parts"]
    assert list(parts) == ["probe", "identity", "prefixes", "order", "overhead", "moves"]
    copies = [told for told in parts["probe"].values() if isinstance(told, dict)]
    assert sum(told["holds"] is True for told in copies) == 4
    for same in (parts["identity"], parts["prefixes"]):
        assert same["holds"]
    cost = parts["order"]["overhead"]["pascal"]
    assert cost["passes"] > 0
    assert 0 < cost["policy_share"] < 1
    assert cost["copy_us_per_token"] > 0
    assert parts["overhead"]["steps"]["pascal"]["mean_tpot_ms"] > 0
    few, many = parts["moves"]["rows"]
    assert few["moves"] > 0
    assert many["mib"] > 2 * few["mib"] > 0
    assert "<svg" in (tmp_path / "order.html").read_text()
    table = (tmp_path / "check.txt").read_text()
    assert "token identity" in table
    assert "verdict on pascal" in table
    assert table.index("\nprobe, after") < table.index("\nmoves, after")


def test_a_site_without_sglang_is_refused(tmp_path):
    done = check("--site", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"check.sh: no sglang in {tmp_path}"]


def test_a_site_and_the_checkout_come_before_everything_that_is_installed(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print(os.environ['PYTHONPATH'].split(':')[:2], file=sys.stderr)"
    )
    done = check("--site", str(tmp_path), "--device", "tpu", PYTHONPATH="")
    assert done.stderr.startswith(str([str(ROOT), str(tmp_path)]))
    assert done.returncode == 2, "argparse on the device: everything before it worked"


def test_help_is_the_head_of_the_script():
    done = check("--help")
    assert done.returncode == 0
    assert "--site DIR" in done.stdout


@pytest.mark.parametrize("arguments", [("--device", "tpu"), ("--only", "nothing")])
def test_an_unknown_device_or_part_is_refused(arguments):
    done = check(*arguments)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
