"""Half a minute of everything at once, on two instances of which one is killed halfway."""

import json
import subprocess
import sys

COMMAND = (sys.executable, "-m", "evals.soak", "--dp-size", "2", "--seconds", "30", "--each", "1")
ENOUGH = {"resident": 10, "host": 10, "recompute": 10, "moved": 10}


def test_nothing_is_wrong_and_nothing_is_left(tmp_path):
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [*COMMAND, "--json", str(out)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (soak,) = json.loads(out.read_text())["soaks"].values()
    short = {
        name: soak["pauses"][name] for name, few in ENOUGH.items() if soak["pauses"][name] < few
    }
    assert short == {}, "too little happened: this shows nothing"
