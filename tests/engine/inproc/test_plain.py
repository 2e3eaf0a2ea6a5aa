"""The bed itself, on the plain model: pauses on every tier change no token."""

from tests.engine.inproc.bed import Request, differing, run

CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}


def requests(count, **more):
    return [
        Request(
            ids=[97 + (7 * i + j) % 26 for j in range(10 + 5 * (i % 7))],
            params={"max_new_tokens": 30 + 5 * (i % 5), **more},
        )
        for i in range(count)
    ]


def test_pauses_change_no_token(tiny_model):
    asked = requests(24)
    stock = run(tiny_model, asked, flags=["--max-total-tokens", "8192"])
    paused = run(tiny_model, asked, CHAOS, ["--max-total-tokens", "1500"])
    assert (stock.kinds["scheduler"], paused.kinds["scheduler"]) == ("Scheduler", "PascalScheduler")
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.status["policy_errors"] == 0
    assert paused.free == paused.capacity
