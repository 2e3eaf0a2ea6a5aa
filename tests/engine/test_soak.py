"""Some seconds of everything at once, on two instances of which one is killed halfway."""

import json
import os
import subprocess
import sys

import pytest

from tests.harness import forked_environment

SECONDS = int(os.environ.get("TEST_SOAK", "20"))
# In so short a time every tier is met by chance alone.
COMMAND = (
    *(sys.executable, "-m", "evals.soak", "--dp-size", "2", "--seconds", str(SECONDS)),
    *("--each", "1", "--chaos", "0.01"),
)
TIERS = ("resident", "host", "recompute", "moved")


@pytest.mark.timeout(600 + SECONDS)
def test_nothing_is_wrong_and_nothing_is_left(tmp_path):
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [*COMMAND, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=500 + SECONDS,
        env={**os.environ, **forked_environment()},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (soak,) = json.loads(out.read_text())["soaks"].values()
    assert all(soak["pauses"][tier] for tier in TIERS), "too little happened: this shows nothing"
