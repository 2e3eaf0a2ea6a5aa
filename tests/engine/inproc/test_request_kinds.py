"""Requests of every kind are paused on every tier that their kind allows, and no token changes."""

import json
import random
import uuid
from itertools import product

import pytest

from tests.engine.inproc.bed import Request, differing, run

CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIERS = ("resident", "host", "recompute")
ROOMY, TIGHT = ["--max-total-tokens", "16384"], ["--max-total-tokens", "1500"]
SMALL = "[a-z]{200}"
TEXT = {"type": "string", "minLength": 60}
SCHEMA = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}
LETTERS = list(range(65, 123))
# Sampling parameters and further fields of a request. A penalty that lacks a token or counts it
# twice changes what is said; the letters are what the model says, so without the count of
# `min_new_tokens` a request ends early.
KINDS = (
    ({"presence_penalty": 1.5}, {}),
    ({"frequency_penalty": 0.7}, {}),
    ({"repetition_penalty": 1.3}, {}),
    ({"min_new_tokens": 25, "stop_token_ids": LETTERS, "ignore_eos": False}, {}),
    ({"regex": SMALL}, {}),
    ({"json_schema": json.dumps(SCHEMA)}, {}),
    ({}, {"return_hidden_states": True}),
    ({}, {"session_params": {"id": "s"}}),
    ({"presence_penalty": 1.5, "regex": SMALL}, {"return_logprob": True, "logprob_start_len": 0}),
)


def prompt(number):
    return [33 + (7 * number + j) % 90 for j in range(10 + 5 * (number % 7))]


def requests(kinds, count):
    return [
        Request(ids=prompt(i), params={"max_new_tokens": 30 + 5 * (i % 5), **params}, options=more)
        for i in range(count)
        for params, more in [kinds[i % len(kinds)]]
    ]


def open_session(scheduler, reqs, number):
    from sglang.srt.managers.io_struct import OpenSessionReqInput

    if number == 1:
        asked = OpenSessionReqInput(capacity_of_str_len=0, session_id="s")
        assert scheduler.session_controller.open(asked).success


def serve(model, asked, settings, flags, **more):
    found = run(model, asked, settings, flags, **more)
    if settings is not None:
        assert found.status["unpausable"] == {}
        assert found.status["policy_errors"] == 0
        assert found.free == found.capacity
    return found


def test_every_kind_survives_pauses_on_every_tier(tiny_model):
    """Without overlap, SGLang says what is right; with overlap it does not count the token that is
    under way, and we do."""
    asked = requests(KINDS, 45)
    flags = ["--enable-return-hidden-states"]
    hook = {"each_pass": f"{__name__}:open_session"}
    no_overlap = ["--disable-overlap-schedule"]
    stock = serve(tiny_model, asked, None, [*flags, *ROOMY, *no_overlap], **hook)
    stopped = [i for i, reason in enumerate(stock.finish) if reason["type"] == "stop"]
    assert stopped == [i for i, each in enumerate(asked) if "stop_token_ids" in each.params]
    assert min(len(stock.outputs[i]) for i in stopped) == 26
    for overlap in ([], no_overlap):
        paused = serve(tiny_model, asked, CHAOS, [*flags, *TIGHT, *overlap], **hook)
        assert paused.kinds["overlap"] is (not overlap)
        assert differing(paused, stock) == []
        assert min(paused.pauses[tier] for tier in TIERS) > 10
        assert paused.hidden_states == stock.hidden_states
