"""Requests of every kind are paused on every tier that their kind allows, and no token changes."""

from tests.engine.inproc.bed import Request, differing, run

CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIERS = ("resident", "host", "recompute")
# A penalty that a request lacks a token of, or counts twice, changes what it says.
PENALTIES = (
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 25, "ignore_eos": False},
)


def prompt(number):
    return [97 + (7 * number + j) % 26 for j in range(10 + 5 * (number % 7))]


def requests(kinds, count):
    return [
        Request(ids=prompt(i), params={"max_new_tokens": 30 + 5 * (i % 5), **kinds[i % len(kinds)]})
        for i in range(count)
    ]


def test_penalties_count_every_token_once(tiny_model):
    asked = requests(PENALTIES, 28)
    no_overlap = ["--disable-overlap-schedule"]
    stock = run(tiny_model, asked, flags=["--max-total-tokens", "8192", *no_overlap])
    for flags in (no_overlap, []):
        paused = run(tiny_model, asked, CHAOS, ["--max-total-tokens", "1500", *flags])
        assert paused.kinds["overlap"] is (not flags)
        assert differing(paused, stock) == []
        assert min(paused.pauses[tier] for tier in TIERS) > 5
        assert paused.status["unpausable"] == {}
