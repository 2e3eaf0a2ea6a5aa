"""DP attention: two instances that take their steps together, of a DeepSeek-shaped model.

They place, pause and move requests as replicas do, and nothing of that shows."""

import http.client
import signal
import time

import psutil
import pytest

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.engine.conftest import SERVE
from tests.engine.inproc.models import FLAGS, build
from tests.engine.load import run
from tests.engine.stage import Reader
from tests.engine.test_migration import FLOOD, at_rest, flood
from tests.harness import TINY_FLAGS, Server
from tests.requests import generate

FAMILY = "deepseek_v3"
COUNT = 60
CROWDED = {"chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TOGETHER = ["--tp-size", "2", "--attn-dp-size", "2"]
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64"]


@pytest.fixture(scope="module")
def serve_family(tmp_path_factory):
    model = build(FAMILY, tmp_path_factory.mktemp(FAMILY) / "model")

    def start(settings, flags):
        env = {
            CONFIG_ENV: PascalConfig(**settings).to_json(),
            "SGLANG_PLATFORM": "pascal_cpu",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
        }
        whole = ["--model-path", str(model), *TINY_FLAGS, *FLAGS[FAMILY], *flags]
        return Server(SERVE, whole, env, warm=True)

    return start


@pytest.fixture(scope="module")
def alone(serve_family):
    """What one instance without pauses and without DP attention answers."""
    with serve_family({"policy": "fcfs"}, []) as server:
        return run(server, COUNT)[0]


@pytest.fixture(scope="module")
def together(serve_family):
    with serve_family({**FLOOD, **CROWDED}, [*TOGETHER, *TIGHT]) as server:
        yield server


def test_a_flood_of_moves_and_pauses_is_invisible(together, alone):
    flood(together, COUNT, alone)
    pauses = [instance["pauses"] for instance in at_rest(together)]
    for tier in ("resident", "host", "recompute"):
        assert sum(counts.get(tier, 0) for counts in pauses) > 10, pauses


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
