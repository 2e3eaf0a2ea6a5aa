"""Random pauses of running requests change no token, lose none, and leave nothing behind."""

import pytest

from tests.engine.load import REQUESTS, run, settled

CHAOS = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]

ARMS = {
    "overlap": ([], {}),
    "two ranks": (["--tp-size", "2"], {}),
    "no overlap, pages of 16": (["--disable-overlap-schedule", "--page-size", "16"], {}),
    "paper, recompute": ([], {"policy": "paper", "host_kv_gb": 0.0}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_chaos_is_invisible(arm, serve, reference):
    flags, settings = ARMS[arm]
    with serve({**CHAOS, **settings}, [*TIGHT, *flags]) as server:
        whole, _ = run(server)
        assert [i for i, (a, b) in enumerate(zip(whole, reference, strict=True)) if a != b] == []
        instance = settled(server)
        assert instance["policy_errors"] == 0
        assert instance["queue_errors"] == 0, "the policy's queue was not SGLang's"
        assert sum(instance["ended"].values()) >= REQUESTS
        metrics = server.get("/metrics")
        for rung in ("resident", "recompute", *([] if "recompute" in arm else ["host"])):
            assert instance["pauses"][rung] > 50
            assert f'rung="{rung}"' in metrics
        kv = instance["kv_tokens"]
        assert (kv["free"] + kv["evictable"], kv["host"]) == (kv["capacity"], 0)
        assert instance["requests"] == []
