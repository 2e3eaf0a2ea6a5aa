"""Time-outs, queue time and load figures of paused requests: those of SGLang's retracted ones.

One slot, memory to spare: a request that has run a quantum gives the slot to a new one. Random
pauses come on top, some by recompute. How long a request has waited is up to the test
(`long_waits`), so that no time-out depends on how fast the machine is.
"""

import sys
import time
import uuid
from pathlib import Path

from tests.engine.load import abort, settled
from tests.engine.stage import Reader
from tests.requests import generate

LONG_WAITS = (sys.executable, str(Path(__file__).with_name("long_waits.py")), "serve")
# No wait is as long as that by itself, and no machine has run for a shorter time.
TIMEOUT_S = 60
QUANTUM = 100
# Of requests that end before that.
LONG = 14_000
MESSAGE = "Request waiting timeout reached."
FLAGS = "--max-running-requests 1 --decode-log-interval 1 --max-total-tokens 32768".split()


def until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Thinker(Reader):
    """Thinks all the time; `meta` is what SGLang has said of it last."""

    def __init__(self, server, total):
        super().__init__(server, generate("Hm", total, total, rid=uuid.uuid4().hex))

    def until(self, tokens):
        """On a busy machine tokens are slow, but they come."""
        seen, deadline = -1, 0.0
        while len(self.ids) < tokens:
            if len(self.ids) > seen:
                seen, deadline = len(self.ids), time.monotonic() + 60
            assert time.monotonic() < deadline, seen
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


def test_a_paused_request_waits_in_sglangs_books(serve, tmp_path):
    settings = {"chaos": 0.03, "quantum_tokens": QUANTUM}
    file = tmp_path / "wait"
    more = {"SGLANG_REQ_WAITING_TIMEOUT": str(TIMEOUT_S), "LONG_WAITS": str(file)}

    def say(reader, seconds, status):
        part = file.with_suffix(".part")
        part.write_text(f"{reader.rid} {seconds} {status}")
        part.rename(file)

    def heard():
        return not file.exists()

    with serve(settings, FLAGS, LONG_WAITS, **more) as server:
        first = Thinker(server, LONG)
        first.until(1)
        say(first, TIMEOUT_S, "running")
        until(heard)
        # Longer ago than the time-out, but pauses put it back into the waiting queue.
        first.until(len(first.ids) + 2 * QUANTUM)
        second = Thinker(server, LONG)
        second.until(1)
        until(lambda: load(server) == (1, 1, 1.0, 1.0))
        assert first.is_alive()
        assert second.is_alive()
        say(first, TIMEOUT_S, "waiting")
        _, ends = first.end()
        reason = first.meta["finish_reason"]
        assert ends == ["abort"]
        assert (reason["status_code"], reason["message"]) == (503, MESSAGE)

        second.until(QUANTUM + 1)
        # It waits for less than the time-out.
        paused_s = TIMEOUT_S / 2
        assert second.meta["queue_time"] < paused_s
        say(second, paused_s, "waiting")
        short = server.post("/generate", generate("Hm", 19, 20))
        assert len(short["output_ids"]) == 20
        assert heard()
        until(lambda: second.meta["queue_time"] > paused_s)  # The pause is queue time.
        until(lambda: server.instances()[0]["pauses"].get("recompute"))
        second.until(len(second.ids) + 1)
        abort(server, second.rid)
        _, ends = second.end()
        assert ends == ["abort"]
        assert second.meta["finish_reason"]["message"] != MESSAGE
        instance = settled(server)
        assert (instance["queue_errors"], instance["policy_errors"]) == (0, 0)
