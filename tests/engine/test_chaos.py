"""Random pauses of running requests change no token, lose none, and leave nothing behind."""

import pytest

from tests.engine.load import REQUESTS, run, settled

CHAOS = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]

ARMS = {
    "overlap": ([], {}),
    "no overlap": (["--disable-overlap-schedule"], {}),
    "two ranks": (["--tp-size", "2"], {}),
    "recompute": ([], {"host_kv_gb": 0.0}),
    "pages of 16": (["--page-size", "16"], {}),
    "paper": ([], {"policy": "paper"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_chaos_is_invisible(arm, serve, reference):
    flags, settings = ARMS[arm]
    with serve({**CHAOS, **settings}, [*TIGHT, *flags]) as server:
        whole, _ = run(server)
        assert [i for i, (a, b) in enumerate(zip(whole, reference, strict=True)) if a != b] == []
        instance = settled(server)
        assert instance["policy_errors"] == 0
        assert sum(instance["ended"].values()) >= REQUESTS
        metrics = server.get("/metrics")
        for rung in ("resident", "recompute", *(["host"] if arm != "recompute" else [])):
            assert instance["pauses"][rung] > 50
            assert f'rung="{rung}"' in metrics
        kv = instance["kv_tokens"]
        assert kv["free"] + kv["evictable"] == kv["capacity"]
        assert instance["requests"] == []
