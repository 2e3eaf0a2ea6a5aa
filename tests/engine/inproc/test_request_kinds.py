"""Requests of every kind are paused on every tier that their kind allows, and no token changes."""

import json
import random
from itertools import chain

import pytest

from pascal_sglang.demo.tiny import END_THINK_ID
from tests.engine import adapters
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
    ({}, {"session_id": "kept in the prefix cache"}),
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
    asked = requests(KINDS, 50)
    flags = ["--enable-return-hidden-states", "--enable-session-radix-cache"]
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
        assert [len(odds) for odds in paused.logprobs] == [len(odds) for odds in stock.logprobs]
        assert [*chain(*paused.logprobs)] == pytest.approx([*chain(*stock.logprobs)], abs=1e-3)


def move_grammars(scheduler, reqs, number):
    """Give the requests the grammars that they would have on another instance, which has or has not
    compiled them."""
    from pascal_sglang.engine.migration import grammar
    from pascal_sglang.engine.migration.request_snapshot import (
        export_state,
        import_state,
        read_snapshot,
    )

    if number % 4:
        return
    manager = scheduler.grammar_manager
    if number % 8:
        manager.grammar_backend.reset()
    # It is not too late for a grammar on a slow machine here.
    grammar.COMPILE_S = 60
    for req in reqs.values():
        if req.output_ids and req.grammar and not req.finished() and req.to_finish is None:
            kv_tokens = len(req.origin_input_ids) + len(req.output_ids) - 1
            snapshot = read_snapshot(export_state(req, 0.0), kv_tokens, scheduler.max_req_len)
            assert snapshot.grammar
            new = import_state(scheduler, snapshot)
            assert grammar.restore_grammar(new, manager)
            assert new.grammar is not req.grammar
            req.grammar = new.grammar
            print("MOVED", type(new.grammar).__name__)


def test_a_grammar_goes_on_after_pauses_and_elsewhere(tiny_model):
    """Strict thinking ends the reasoning after 12 tokens; what follows has its grammar."""
    thinks = {"require_reasoning": True}
    kinds = [({"regex": SMALL}, thinks), ({}, thinks), ({"regex": SMALL}, {}), ({}, {})]
    asked = requests(kinds, 24)
    env = {"SGLANG_MAX_THINK_TOKENS": "12"}
    strict = ["--enable-strict-thinking"]
    stock = serve(tiny_model, asked, None, [*strict, *ROOMY], **env)
    ends = [ids.index(END_THINK_ID) if END_THINK_ID in ids else None for ids in stock.outputs]
    assert ends == [12 if each.options else None for each in asked]
    hook = {"each_pass": f"{__name__}:move_grammars"}
    paused = serve(tiny_model, asked, CHAOS, [*strict, *TIGHT], **hook, **env)
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in TIERS) > 5
    assert paused.log.count("MOVED ReasonerGrammarObject") > 50


@pytest.fixture(scope="module")
def loras(tiny_model, tmp_path_factory):
    return adapters.build(tiny_model, tmp_path_factory.mktemp("lora"))


def test_a_request_comes_back_when_its_adapter_fits(tiny_model, loras):
    flags, ids = adapters.flags(loras), [lora_id for _, lora_id in loras.values()]
    asked = requests([({}, {"lora_id": each}) for each in (*ids, None)], 28)
    hook = {"prepare": f"{adapters.__name__}:pin_nothing"}
    stock = serve(tiny_model, asked, None, [*flags, *ROOMY], **hook)
    plain = serve(tiny_model, requests([({}, {})], 28), None, ROOMY)
    with_adapter = [i for i in range(28) if i % 4 < 3]
    assert differing(plain, stock) == with_adapter
    few = ["--max-running-requests", "6"]
    paused = serve(tiny_model, asked, CHAOS, [*flags, *TIGHT, *few], **hook)
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in TIERS) > 5


def keep_float32(scheduler, reqs, number):
    """SGLang casts input embeddings, and the tiny model is no bfloat16."""
    import torch

    torch.Tensor.bfloat16 = lambda tensor: tensor


def test_input_embeddings_are_never_made_again(tiny_model):
    dice = random.Random(0)
    asked = [
        Request(
            ids=[],
            params={"max_new_tokens": 30 + 5 * (i % 5)},
            options={"input_embeds": [[dice.gauss(0, 0.2) for _ in range(128)] for _ in range(9)]},
        )
        for i in range(20)
    ]
    flags = ["--disable-radix-cache"]
    hook = {"each_pass": f"{__name__}:keep_float32"}
    stock = serve(tiny_model, asked, None, [*flags, *ROOMY], **hook)
    paused = serve(tiny_model, asked, CHAOS, [*flags, "--max-total-tokens", "500"], **hook)
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host")) > 5
    assert "recompute" not in paused.pauses
