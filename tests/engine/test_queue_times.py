"""Time-outs, queue time and load figures of paused requests: those of SGLang's retracted ones.

One slot, memory to spare. A request that has run a quantum gives the slot to a new one, for two
quanta; random pauses, some by recompute, come on top.
"""

import threading
import time

import pytest

from tests.engine.load import settled
from tests.engine.stage import Reader
from tests.requests import generate

TIMEOUT_S, QUANTUM = 3, 1500
FLAGS = "--max-running-requests 1 --decode-log-interval 1".split()


@pytest.fixture(scope="module")
def one_slot(serve):
    settings = {"quantum_tokens": QUANTUM, "chaos": 0.01}
    with serve(settings, FLAGS, SGLANG_REQ_WAITING_TIMEOUT=str(TIMEOUT_S)) as server:
        yield server


def until(reader, tokens):
    deadline = time.monotonic() + 120
    while len(reader.ids) < tokens:
        assert time.monotonic() < deadline, len(reader.ids)
        assert not reader.ends, (reader.ends, len(reader.ids))
        time.sleep(0.01)


def gauge(server, name):
    lines = server.get("/metrics").splitlines()
    return [float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"sglang:{name}{{")]
