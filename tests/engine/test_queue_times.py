"""Time-outs, queue time and load figures of paused requests: those of SGLang's retracted ones.

One slot, memory to spare: a request that has run a quantum gives the slot to a new one. Random
pauses come on top, some by recompute.
"""

import time
import uuid

from tests.engine.load import settled
from tests.engine.stage import Reader
from tests.requests import generate

TIMEOUT_S, QUANTUM = 3, 2000
MESSAGE = "Request waiting timeout reached."
FLAGS = "--max-running-requests 1 --decode-log-interval 1".split()


class Thinker(Reader):
    """Thinks all the time; `meta` is what SGLang has said of it last."""

    def __init__(self, server, total):
        self.meta = {}
        super().__init__(server, generate("Hm", total, total, rid=uuid.uuid4().hex))

    def _take(self, event):
        super()._take(event)
        self.meta = event["meta_info"]

    def until(self, tokens):
        deadline = time.monotonic() + 120
        while len(self.ids) < tokens:
            assert time.monotonic() < deadline, len(self.ids)
            assert not self.ends, self.meta
            time.sleep(0.01)


def load(server):
    """Running and waiting requests as routers and as dashboards see them."""
    (one,) = server.get("/v1/loads")["loads"]
    gauges = [
        float(line.rsplit(" ", 1)[1])
        for name in ("running", "queue")
        for line in server.get("/metrics").splitlines()
        if line.startswith(f"sglang:num_{name}_reqs{{")
    ]
    return one["num_running_reqs"], one["num_waiting_reqs"], *gauges


def test_a_paused_request_waits_in_sglangs_books(serve):
    settings = {"quantum_tokens": QUANTUM, "chaos": 0.01}
    with serve(settings, FLAGS, SGLANG_REQ_WAITING_TIMEOUT=str(TIMEOUT_S)) as server:
        first = Thinker(server, 3 * QUANTUM)
        # Longer than the time-out, with pauses that put it back into the waiting queue.
        first.until(QUANTUM + 1)
        second = Thinker(server, QUANTUM + 200)
        second.began.wait(60)
        seen = []
        while first.is_alive() and second.is_alive():
            seen.append(load(server))
        _, ends = first.end()
        reason = first.meta["finish_reason"]
        assert ends == ["abort"]
        assert (reason["status_code"], reason["message"]) == (503, MESSAGE)
        assert sum(figures == (1, 1, 1.0, 1.0) for figures in seen) > len(seen) / 2, seen

        second.until(QUANTUM + 1)
        begin = time.monotonic()
        short = server.post("/generate", generate("Hm", 99, 100))
        took = time.monotonic() - begin
        _, ends = second.end()
        assert ends == ["length"]
        assert len(short["output_ids"]) == 100
        waited = second.meta["queue_time"] + short["meta_info"]["queue_time"]
        assert 0.5 * took < waited, "the pause is queue time"
        instance = settled(server)
        assert instance["pauses"]["recompute"] > 0
        assert (instance["queue_errors"], instance["policy_errors"]) == (0, 0)
