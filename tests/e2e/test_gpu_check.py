"""`evals/gpu/check.sh` on a CPU: the real script, real servers, and results that say what ran. The
servers are forks (`forks/sitecustomize.py`)."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.harness import WARM_ENV, warm_servers

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "evals" / "gpu" / "check.sh"
FORKS = Path(__file__).with_name("forks")


def check(*arguments, timeout=560, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PASCAL_PYTHON": sys.executable, **environment},
    )


def test_the_check_is_green_on_a_cpu(tmp_path):
    forks = {WARM_ENV: warm_servers(), "PYTHONPATH": f"{FORKS}:{ROOT}"}
    done = check("--device", "cpu", "--quick", "--out", str(tmp_path), **forks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["failed"] == []
    assert "cores of" in found["device"]["device"]
    assert found["seconds"] > 0
    same = found["parts"]["identity"]
    assert same["holds"]
    assert same["pauses"]["host"] > 20
    assert same["migrations"]["moved"] > 5
    cost = found["parts"]["one"]["overhead"]["pascal"]
    assert cost["passes"] > 100
    assert 0 < cost["policy_share"] < 1
    assert cost["copy_us_per_token"] > 0
    assert "<svg" in (tmp_path / "one.html").read_text()
    table = (tmp_path / "check.txt").read_text()
    assert "token identity" in table
    assert "verdict on pascal" in table


def test_wheels_without_ours_are_refused(tmp_path):
    done = check("--wheels", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"check.sh: no wheel of pascal_sglang in {tmp_path}"]


def test_wheels_are_used_without_a_network(tmp_path):
    """A wheel in the folder is what the check's python sees first."""
    info = "pascal_sglang-0.dist-info"
    with zipfile.ZipFile(tmp_path / "pascal_sglang-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", "import sys; print('from the wheel', file=sys.stderr)")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: pascal_sglang\nVersion: 0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    done = check("--wheels", str(tmp_path), "--device", "tpu", PIP_INDEX_URL="http://127.0.0.1:9")
    assert done.stderr.startswith("from the wheel")
    assert done.returncode == 2, "argparse on the device: everything before it worked"


def test_help_is_the_head_of_the_script():
    done = check("--help")
    assert done.returncode == 0
    assert "--wheels DIR" in done.stdout


@pytest.mark.parametrize("device", ["tpu"])
def test_an_unknown_device_is_refused(device):
    done = check("--device", device)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
