"""DP attention: two instances that take their steps together, of a DeepSeek-shaped model.

They place, pause and move requests as replicas do, and nothing of that shows."""

import http.client
import signal
import time

import psutil
import pytest

from tests.engine.inproc.conftest import is_before
from tests.engine.inproc.models import FLAGS
from tests.engine.load import run
from tests.engine.stage import Reader
from tests.engine.test_migration import FLOOD, at_rest, flood
from tests.requests import generate

FAMILY = "deepseek_v3"
COUNT = 40
CROWDED = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TOGETHER = ["--tp-size", "2", "--attn-dp-size", "2"]
if is_before("0.5.22"):
    TOGETHER = ["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"]
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]


@pytest.fixture(scope="module")
def alone(serve, family):
    """What one instance without pauses and without DP attention answers."""
    with serve({"policy": "fcfs"}, FLAGS[FAMILY], model=family(FAMILY)) as server:
        return run(server, COUNT)[0]


@pytest.fixture(scope="module")
def together(serve, family):
    flags = [*FLAGS[FAMILY], *TOGETHER, *TIGHT]
    with serve({**FLOOD, **CROWDED}, flags, model=family(FAMILY)) as server:
        yield server


def test_a_flood_of_moves_and_pauses_is_invisible(together, alone):
    flood(together, COUNT, alone)
    pauses = [instance["pauses"] for instance in at_rest(together)]
    for tier in ("resident", "host", "recompute"):
        assert sum(counts.get(tier, 0) for counts in pauses) > 0, pauses


def answers(server):
    try:
        server.post("/generate", generate("one more", think=None, total=2), timeout=30)
    except (OSError, http.client.HTTPException):
        return False
    return True


def test_no_instance_outlives_another(together):
    """Its steps would wait for it without end. Clients hear of it, and the server ends whole."""
    reader = Reader(together, generate("A long one", think=None, total=2000, rid="long"))
    assert reader.began.wait(30)
    psutil.Process(together.instances()[1]["pid"]).send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while answers(together):
        assert time.monotonic() < deadline, "the instances that are left still serve"
    reader.join(30)
    assert not reader.is_alive()
    assert together.process.wait(30) != 0
    assert together.wait_gone() == []
