"""Models whose pools are of their own kind, over HTTP with little memory: pauses, moves and a drain
change no token."""

import pytest

from tests.engine.inproc.conftest import HYBRID_POOLS
from tests.engine.inproc.models import FLAGS
from tests.engine.load import run
from tests.engine.test_migration import (
    at_rest,
    differences,
    nothing_left,
    total,
    with_a_drain,
)

pytestmark = HYBRID_POOLS
COUNT = 60
CROWDED = {"chaos": 0.03, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]
# By itself SGLang takes a share of the machine's memory for states.
STATES = (
    "--mamba-radix-cache-strategy extra_buffer --mamba-track-interval 64 --max-mamba-cache-size 320"
).split()
FAMILY_FLAGS = {"gpt_oss": FLAGS["gpt_oss"], "qwen3_next": STATES}


@pytest.fixture(params=FAMILY_FLAGS)
def name(request):
    return request.param


@pytest.fixture
def alone(name, serve, family):
    """What one instance without pauses answers."""
    with serve({"policy": "fcfs"}, FAMILY_FLAGS[name], model=family(name)) as server:
        return run(server, COUNT)[0]


def test_pauses_and_moves_change_no_token_and_the_level_is_said(name, serve, family, alone):
    flags = [*FAMILY_FLAGS[name], *TIGHT, "--dp-size", "2"]
    settings = {**CROWDED, "force_migration": 0.02}
    with serve(settings, flags, model=family(name)) as server:
        whole, _ = with_a_drain(server, lambda: run(server, COUNT))
        instances = at_rest(server)
        support = server.get("/pascal/status")["support"]
        metrics, output = server.get("/metrics"), server.output
    assert differences(whole, alone) == []
    nothing_left(instances)
    for tier in ("resident", "host", "recompute"):
        assert sum(i["pauses"].get(tier, 0) for i in instances) > 5, [
            i["pauses"] for i in instances
        ]
    moved = total(instances, "outgoing", "moved")
    assert moved == total(instances, "incoming", "taken")
    assert moved > COUNT / 3
    for pool in ("windows", "recurrent_states"):
        pools = [i[pool] for i in instances if i[pool] is not None]
        assert all(p["free"] == p["capacity"] for p in pools)
    assert support == {"level": "move", "lowered_by": []}
    assert "pascal:support_level{" in metrics
    assert "level move" in output
