"""Models whose pools are of their own kind, over HTTP with little memory: pauses, moves and a drain
change no token."""

import functools

import pytest

from tests.engine.conftest import MORE
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
COUNT = 40
CROWDED = {"chaos": 0.03, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]
# By itself SGLang takes a share of the machine's memory for states.
STATES = (
    "--mamba-radix-cache-strategy extra_buffer --mamba-track-interval 64 --max-mamba-cache-size 320"
).split()
FAMILY_FLAGS = {"gpt_oss": FLAGS["gpt_oss"], "qwen3_next": STATES}


@pytest.fixture(scope="module")
def alone(serve, family):
    """What one instance of a family answers without pauses."""

    @functools.cache
    def answers(name):
        with serve({"policy": "fcfs"}, FAMILY_FLAGS[name], model=family(name)) as server:
            return run(server, COUNT)[0]

    return answers


@pytest.mark.parametrize("instances", [2, pytest.param(1, marks=MORE)])
@pytest.mark.parametrize("name", FAMILY_FLAGS)
def test_pauses_and_moves_change_no_token_and_the_level_is_said(
    name, instances, serve, family, alone
):
    expected = alone(name)
    flags, settings = [*FAMILY_FLAGS[name], *TIGHT], CROWDED
    if instances > 1:
        flags, settings = [*flags, "--dp-size", "2"], {**CROWDED, "force_migration": 0.02}
    with serve(settings, flags, model=family(name)) as server:
        if instances > 1:
            whole, _ = with_a_drain(server, lambda: run(server, COUNT))
        else:
            whole, _ = run(server, COUNT)
        seen = at_rest(server)
        support = server.get("/pascal/status")["support"]
        metrics, output = server.get("/metrics"), server.output
    assert differences(whole, expected) == []
    nothing_left(seen)
    assert len(seen) == instances
    for tier in ("resident", "host", "recompute"):
        assert sum(i["pauses"].get(tier, 0) for i in seen) > 5, [i["pauses"] for i in seen]
    for pool in ("windows", "recurrent_states"):
        pools = [i[pool] for i in seen if i[pool] is not None]
        assert all(p["free"] == p["capacity"] for p in pools)
    assert "pascal:support_level{" in metrics
    if instances == 1:
        assert support == {"level": "pause", "lowered_by": ["one instance"]}
        return
    moved = total(seen, "outgoing", "moved")
    assert moved == total(seen, "incoming", "taken")
    assert moved > COUNT / 3
    assert support == {"level": "move", "lowered_by": []}
    assert "level move" in output
