"""Workloads repeat exactly, and the client turns events into token times."""

import json

import numpy as np
import pytest

from evals.client import note_event, prompt_ids, request_body
from evals.metrics import Record
from evals.workload import PRESETS, Item, generate, load, save


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_items(preset):
    assert generate(preset, 50, 2.0, 7) == generate(preset, 50, 2.0, 7)
    assert generate(preset, 50, 2.0, 7) != generate(preset, 50, 2.0, 8)


def test_the_rate_only_stretches_arrivals():
    slow, fast = generate("tiny-live", 40, 1.0, 3), generate("tiny-live", 40, 4.0, 3)
    for a, b in zip(slow, fast, strict=True):
        assert (a.thinking_tokens, a.answer_tokens) == (b.thinking_tokens, b.answer_tokens)
        assert a.arrival_s == pytest.approx(4 * b.arrival_s)


@pytest.mark.parametrize(
    ("preset", "thinking", "answer"),
    [("alpacaeval", 558, 566), ("arena-hard", 950, 824), ("tiny-live", 160, 120)],
)
def test_preset_means(preset, thinking, answer):
    items = generate(preset, 40_000, 1.0, 0)
    assert np.mean([i.thinking_tokens for i in items]) == pytest.approx(thinking, rel=0.05)
    assert np.mean([i.answer_tokens for i in items]) == pytest.approx(answer, rel=0.05)


def test_reasoning_heavy_ratios():
    items = generate("reasoning-heavy", 2000, 1.0, 0)
    ratios = [i.thinking_tokens / i.answer_tokens for i in items]
    assert min(ratios) > 3.8
    assert max(ratios) < 8.6


def test_scale_shrinks_outputs_not_prompts():
    full, half = generate("alpacaeval", 500, 1.0, 0), generate("alpacaeval", 500, 1.0, 0, scale=0.5)
    assert [i.prompt_tokens for i in full] == [i.prompt_tokens for i in half]
    for a, b in zip(full, half, strict=True):
        assert b.thinking_tokens == pytest.approx(a.thinking_tokens / 2, abs=1)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_arrivals_have_the_rate_and_the_variation(cv):
    arrivals = [i.arrival_s for i in generate("tiny-live", 40_000, 5.0, 1, cv=cv)]
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_bad_loads_are_refused():
    for arguments in ((0, 1.0), (10, 0.0), (10, -1.0)):
        with pytest.raises(ValueError, match="positive"):
            generate("tiny-live", *arguments, 0)


def test_files_hold_items_exactly(tmp_path):
    items = generate("alpacaeval", 200, 0.3, 5)
    save(items, tmp_path / "items.jsonl")
    assert load(tmp_path / "items.jsonl") == items


def test_prompts_are_distinct_from_their_first_tokens():
    prompts = [prompt_ids(i, 24, seed=1) for i in range(2000)]
    assert len({tuple(p[:2]) for p in prompts}) == len(prompts)
    assert all(len(p) == 24 and 0 <= min(p) <= max(p) < 256 for p in prompts)
    assert prompts[5] == prompt_ids(5, 24, seed=1) != prompt_ids(5, 24, seed=2)


def test_a_body_asks_for_exactly_the_item():
    body = request_body(Item(0.0, 9, 20, 30), 0, 0, "processor")
    assert body["sampling_params"]["max_new_tokens"] == 51
    assert body["sampling_params"]["custom_params"] == {"thinking_budget": 20}
    assert body["require_reasoning"]
    assert body["stream"]
    assert len(body["input_ids"]) == 9


def event(completion, reasoning, reason=None):
    meta = {
        "completion_tokens": completion,
        "reasoning_tokens": reasoning,
        "finish_reason": reason,
    }
    return b"data: " + json.dumps({"text": "x", "meta_info": meta}).encode()


def test_every_token_of_an_event_gets_its_time():
    seen = Record(0.0)
    note_event(seen, event(1, 1), 0.5)
    note_event(seen, event(4, 2), 0.7)
    note_event(seen, event(5, 2, {"type": "length"}), 0.9)
    note_event(seen, b"data: [DONE]", 1.0)
    note_event(seen, b"", 1.0)
    assert seen.token_s == [0.5, 0.7, 0.7, 0.7, 0.9]
    assert seen.answer_s == [0.7, 0.7, 0.9]
    assert seen.finished
    assert seen.error is None


def test_aborts_and_errors_are_kept():
    aborted, failed = Record(0.0), Record(0.0)
    note_event(aborted, event(1, 1, {"type": "abort", "message": "full"}), 0.5)
    note_event(failed, b'data: {"error": {"message": "bad"}}', 0.5)
    assert aborted.error == "abort: full"
    assert "bad" in failed.error
    assert not aborted.finished
    assert not failed.finished
