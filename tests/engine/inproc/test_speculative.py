"""Speculative decoding: pauses change no token, no draft, and leave no KV behind.

Greedy output is that of the target model alone, whatever the draft model proposes.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from pascal_sglang.demo.eagle import eagle_head
from pascal_sglang.demo.tiny import END_THINK_ID, build_tiny_model
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.draft_rows import pack, unpack
from tests.engine.conftest import MORE
from tests.engine.inproc import draft_models
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import PAGES, SAMPLED_DRAFTS

CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
STEPS = 3
NO_OVERLAP = ["--disable-overlap-schedule"]
AMPLE = ["--max-total-tokens", "8192"]
HERE = "tests.engine.inproc.test_speculative"
KINDS = ("standalone", "eagle", "eagle3", "mtp")
# Whose draft workers differ; those of the others are the second one's.
APART = KINDS[:2]


def speculation(algorithm, draft):
    return [
        *("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(STEPS + 1)),
    ]


def requests(count, *, options=None, **params):
    return [
        Request(
            ids=[97 + (7 * i + j) % 26 for j in range(10 + 5 * (i % 7))],
            params={"max_new_tokens": 30 + 5 * (i % 5), **params},
            options=options or {},
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def servers(tiny_model, tmp_path_factory):
    """By kind: the target model, and the flags of its speculation."""
    folder = tmp_path_factory.mktemp("drafts")
    deep = build_tiny_model(folder / "deep", layers=4)
    copy = draft_models.imprecise_copy(tiny_model, folder / "copy")
    head = eagle_head(tiny_model, folder / "head")
    head3 = draft_models.eagle3_head(deep, folder / "head3")
    whole = draft_models.with_token_predictor(tiny_model, folder / "whole")
    return {
        "standalone": (tiny_model, speculation("STANDALONE", copy)),
        "eagle": (tiny_model, speculation("EAGLE", head)),
        "eagle3": (deep, speculation("EAGLE3", head3)),
        "mtp": (whole, speculation("EAGLE", whole)),
    }


class References:
    """By kind: what the target model writes alone, and with its draft model, without pauses."""

    def __init__(self, servers):
        self.servers, self.alone, self.found = servers, {}, {}

    def __getitem__(self, kind):
        if kind not in self.found:
            model, flags = self.servers[kind]
            if model not in self.alone:
                self.alone[model] = run(model, requests(24), flags=AMPLE)
            drafted = run(model, requests(24), flags=[*AMPLE, *flags])
            self.found[kind] = (self.alone[model], drafted)
        return self.found[kind]


@pytest.fixture(scope="module")
def references(servers):
    return References(servers)


@pytest.mark.parametrize(
    ("kind", "overlap"),
    [
        *((kind, True) for kind in KINDS),
        *(pytest.param(kind, False, marks=() if kind in APART else MORE) for kind in KINDS),
    ],
)
def test_pauses_change_no_token(servers, references, kind, overlap):
    model, flags = servers[kind]
    more = [] if overlap else NO_OVERLAP
    paused = run(model, requests(24), CHAOS, ["--max-total-tokens", "1800", *flags, *more])
    alone, unpaused = references[kind]
    assert paused.kinds["overlap"] is overlap
    assert min(unpaused.spec_steps) > 0
    assert differing(unpaused, alone) == []
    assert differing(paused, unpaused) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.status["policy_errors"] == paused.status["queue_errors"] == 0
    assert paused.free == paused.capacity


def keep_kv(scheduler, reqs, passes):
    """No pause drops KV: a prefill would make the draft model's anew. What the draft model keeps of
    paused requests is what an instance that they migrate to would read."""
    paused_requests = scheduler.plan_executor.paused_requests
    for req in paused_requests.in_status(PauseStatus.RESIDENT, PauseStatus.HOST):
        paused = paused_requests._table[req]
        paused.drafted = unpack(pack(paused.drafted), scheduler)
    if passes == 1:
        chaos = scheduler.plan_executor._chaos
        drawn = chaos.tier
        chaos.tier = lambda recomputes: drawn(recomputes=False)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("kind", APART)
def test_drafts_go_on_as_before(servers, references, kind, overlap):
    """As many steps for as many tokens: with other KV or another row than it had, the draft model
    would propose others."""
    model, flags = servers[kind]
    more = [] if overlap else NO_OVERLAP
    flags = [*AMPLE, *flags, *more]
    paused = run(model, requests(24), CHAOS, flags, each_pass=f"{HERE}:keep_kv")
    _, unpaused = references[kind]
    assert differing(paused, unpaused) == []
    assert paused.spec_steps == unpaused.spec_steps
    assert sum(unpaused.spec_steps) < 0.95 * sum(len(ids) for ids in unpaused.outputs)
    assert paused.pauses.get("recompute", 0) == paused.status["policy_errors"] == 0
    assert min(paused.pauses[tier] for tier in ("resident", "host")) > 20


@pytest.mark.parametrize("page", [1, pytest.param(16, marks=PAGES)])
def test_under_pressure_requests_share_memory(servers, references, page):
    """A step takes KV for its drafts ahead: what fits is counted with that."""
    model, flags = servers["standalone"]
    flags = ["--max-total-tokens", "640", "--page-size", str(page), *flags]
    settings = {"quantum_tokens": 20, "answer_tpot_ms": 40.0}
    pressed = run(model, requests(24), settings, flags)
    assert differing(pressed, references["standalone"][1]) == []
    assert (
        sum(pressed.pauses[t] for t in ("resident", "host", "recompute") if t in pressed.pauses) > 5
    )
    assert pressed.status["policy_errors"] == pressed.status["queue_errors"] == 0
    assert pressed.free == pressed.capacity


def end_thinking(scheduler, reqs, passes):
    """Logit processors do not act on drafts: the thinking ends with a token that the model writes
    by itself."""
    if passes == 1:
        scheduler.model_config.think_end_ids = [int(os.environ["THINK_END"])]


def test_thinking_ends_inside_an_accepted_run(servers, references):
    model, flags = servers["standalone"]
    _, unpaused = references["standalone"]
    inner = Counter(token for ids in unpaused.outputs for token in {*ids[5:-5]} - {*ids[:5]})
    end = inner.most_common(1)[0][0]
    asked = requests(24, options={"require_reasoning": True})
    paused = run(
        model,
        asked,
        CHAOS,
        ["--max-total-tokens", "1800", *flags],
        each_pass=f"{HERE}:end_thinking",
        THINK_END=str(end),
    )
    assert differing(paused, unpaused) == []
    seen = {each["rid"]: each for each in paused.status["recent"]}
    assert len(seen) == len(asked)
    inside = 0
    for i, ids in enumerate(unpaused.outputs):
        found, thought = seen[f"r{i}"], ids.index(end) + 1 if end in ids else len(ids)
        assert found["reasoning_tokens"] == thought
        assert found["answer_tokens"] == len(ids) - thought
        if found["ttfo_s"] is not None:
            # With its first answering token in the same pass.
            inside += found["ttfo_s"] == pytest.approx(found["ttft_s"] + found["reasoning_time_s"])
    assert inside > 3


@SAMPLED_DRAFTS
def test_sampled_requests_run_beside_greedy_ones(servers, references):
    model, flags = servers["standalone"]
    _, unpaused = references["standalone"]
    asked = requests(24)
    for i in range(0, 24, 3):
        sampled = {**asked[i].params, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
        asked[i] = Request(ids=asked[i].ids, params=sampled)
    paused = run(model, asked, CHAOS, ["--max-total-tokens", "1800", *flags])
    greedy = [i for i in range(24) if i % 3]
    assert [paused.outputs[i] for i in greedy] == [unpaused.outputs[i] for i in greedy]
    assert [len(ids) for ids in paused.outputs] == [len(ids) for ids in unpaused.outputs]
    assert paused.free == paused.capacity


def test_grammars_and_log_probabilities_go_along(servers):
    model, flags = servers["standalone"]
    asked = requests(24, regex="[a-h]{15,30}x[a-h]{5,9}", ignore_eos=False)
    asked[::2] = [replace(each, options={"return_logprob": True}) for each in asked[::2]]
    alone = run(model, asked, flags=AMPLE)
    paused = run(model, asked, CHAOS, ["--max-total-tokens", "1800", *flags])
    assert differing(paused, alone) == []
    for found, expected in zip(paused.logprobs, alone.logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.free == paused.capacity


def test_strict_thinking_ends_at_its_budget_with_drafts(servers):
    """The only way to bound thinking there: processors do not act on drafts, masks do."""
    model, flags = servers["eagle"]
    asked = requests(24, max_new_tokens=60)
    for i, each in enumerate(asked):
        params = {**each.params, "custom_params": {"thinking_budget": 5 + i}}
        asked[i] = replace(each, params=params, options={"require_reasoning": True})
    strict = ["--enable-strict-thinking"]
    alone = run(model, asked, flags=[*AMPLE, *strict])
    paused = run(model, asked, CHAOS, ["--max-total-tokens", "1800", *flags, *strict])
    assert [ids.index(END_THINK_ID) for ids in alone.outputs] == [5 + i for i in range(24)]
    assert differing(paused, alone) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.free == paused.capacity
