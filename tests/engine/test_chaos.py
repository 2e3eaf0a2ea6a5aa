"""Random pauses of running requests change no token, lose none, and leave nothing behind."""

import http.client
import sys
import time
from pathlib import Path

import pytest

from tests.engine.conftest import LATE, SERVE
from tests.engine.inproc.conftest import arms
from tests.engine.load import REQUESTS, run, settled
from tests.requests import generate

CHAOS = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]
FAILING = (sys.executable, str(Path(__file__).with_name("failing_rank.py")), "serve")

ARMS = {
    "a late device": (LATE, [], {}),
    "no overlap, pages of 16": (SERVE, ["--disable-overlap-schedule", "--page-size", "16"], {}),
    "paper, recompute": (SERVE, [], {"policy": "paper", "host_kv_gb": 0.0}),
}


def chaos(server, reference, *tiers):
    """The load under chaos: nothing of that shows in what comes back, nor afterwards."""
    whole, _ = run(server)
    assert [i for i, (a, b) in enumerate(zip(whole, reference, strict=True)) if a != b] == []
    instance = settled(server)
    assert instance["policy_errors"] == 0
    assert instance["queue_errors"] == 0, "the policy's queue was not SGLang's"
    assert sum(instance["ended"].values()) >= REQUESTS
    metrics = server.get("/metrics")
    for tier in tiers:
        assert instance["pauses"][tier] > 10
        assert f'tier="{tier}"' in metrics
    kv = instance["kv_tokens"]
    assert (kv["free"] + kv["evictable"], kv["host"]) == (kv["capacity"], 0)
    assert instance["requests"] == []
    return instance


@pytest.mark.parametrize("arm", arms(ARMS))
def test_chaos_is_invisible(arm, serve, reference):
    command, flags, settings = ARMS[arm]
    with serve({**CHAOS, **settings}, [*TIGHT, *flags], command) as server:
        chaos(server, reference, "resident", "recompute", *([] if "recompute" in arm else ["host"]))
        if command is LATE is not SERVE:
            assert "WRITE THE SAME ROW" in server.output, "no row changed hands: this shows nothing"


def test_a_rank_whose_copies_fail_is_followed_by_the_other_one(serve, reference, tmp_path):
    """And where it fails in a way that the other cannot follow, the instance ends and says why."""
    switch = tmp_path / "break"
    more = {"BREAK_FILE": str(switch)}
    with serve(CHAOS, [*TIGHT, "--tp-size", "2"], FAILING, **more) as server:
        instance = chaos(server, reference, "resident", "recompute", "host")
        assert instance["pauses"]["copy_failed"] > 0
        switch.touch()
        with pytest.raises((OSError, http.client.HTTPException)):
            server.post("/generate", generate("one more", think=None, total=20), timeout=60)
        deadline = time.monotonic() + 30
        while server.process.poll() is None:
            assert time.monotonic() < deadline, "ranks that went different ways still serve"
            time.sleep(0.1)
        output = server.output
    # Of both ranks, or of the one whose exception ends the server.
    assert "a TP rank failed alone (" in output
