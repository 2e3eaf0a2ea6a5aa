"""Models whose pools are of their own kind, over HTTP with little memory: no token changes."""

import pytest

from tests.engine.inproc.models import FLAGS
from tests.engine.load import run
from tests.engine.test_migration import at_rest, differences, nothing_left

COUNT = 60
CROWDED = {"chaos": 0.03, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]
# By itself SGLang takes a share of the machine's memory for states.
STATES = (
    "--mamba-radix-cache-strategy extra_buffer --mamba-track-interval 64 --max-mamba-cache-size 320"
).split()
FAMILY_FLAGS = {"gpt_oss": FLAGS["gpt_oss"], "qwen3_next": STATES}
WHY = {
    "gpt_oss": "a pool with sliding windows",
    "qwen3_next": "a pool of recurrent states (Mamba)",
}


@pytest.fixture(params=FAMILY_FLAGS)
def name(request):
    return request.param


@pytest.fixture
def alone(name, serve, family):
    """What one instance without pauses answers."""
    with serve({"policy": "fcfs"}, FAMILY_FLAGS[name], model=family(name)) as server:
        return run(server, COUNT)[0]


def test_pauses_change_no_token_and_the_level_is_said(name, serve, family, alone):
    """Two instances where requests could migrate, but for the pool."""
    flags = [*FAMILY_FLAGS[name], *TIGHT, "--dp-size", "2"]
    settings = {**CROWDED, "migration": "adaptive"}
    with serve(settings, flags, model=family(name)) as server:
        whole, _ = run(server, COUNT)
        instances = at_rest(server)
        support = server.get("/pascal/status")["support"]
        metrics, output = server.get("/metrics"), server.output
    assert differences(whole, alone) == []
    nothing_left(instances)
    for tier in ("resident", "host", "recompute"):
        assert sum(i["pauses"].get(tier, 0) for i in instances) > 5, [
            i["pauses"] for i in instances
        ]
    assert support == {"level": "pause", "lowered_by": [WHY[name]]}
    assert "pascal:support_level{" in metrics
    assert f"pause ({WHY[name]})" in output
