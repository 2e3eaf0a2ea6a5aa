"""Workloads repeat exactly, and the client turns events into token times."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals.load.client import note_event, request_body
from evals.load.prompt import prompt_ids
from evals.load.record import Record
from evals.workload import (
    PRESETS,
    Item,
    Recipe,
    WorkloadError,
    build,
    generate,
    load,
    main,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_items(preset):
    assert generate(preset, 50, 2.0, 7) == generate(preset, 50, 2.0, 7)
    assert generate(preset, 50, 2.0, 7) != generate(preset, 50, 2.0, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "items"),
    [
        (
            ("alpacaeval", 3, 2.0, 7),
            {},
            [
                (0.7728140170167341, 50, 139, 431),
                (0.9197542874379556, 60, 215, 1201),
                (1.0443501576324115, 43, 126, 277),
            ],
        ),
        (
            ("reasoning-heavy", 2, 0.5, 1),
            {"scale": 0.5, "cv": 2.0},
            [(0.09704529589362754, 123, 1347, 184), (0.6282821671337577, 164, 310, 55)],
        ),
        (
            ("tiny-live", 3, 4, 0),
            {},
            [
                (0.6178137403752245, 24, 117, 259),
                (0.8384670161300871, 22, 66, 188),
                (1.0093241395963957, 28, 148, 42),
            ],
        ),
    ],
)
def test_seeds_keep_their_meaning(arguments, options, items):
    """Drawn by the first version; figures published with a seed are of these items."""
    drawn = generate(*arguments, **options)
    lengths = [(i.arrival_s, i.prompt_tokens, i.thinking_tokens, i.answer_tokens) for i in drawn]
    assert lengths == [pytest.approx(item, rel=1e-12) for item in items]


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arrivals": "weekly"}, "no arrivals 'weekly'; there are poisson, gamma, burst, trace"),
        ({"arrivals": "poisson", "cv": 2.0}, "cv is for gamma"),
        ({"arrivals": "trace"}, "no times of its own"),
        ({"start_s": 5.0}, "no times of its own"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"rate": float("nan")}, "rate must be positive"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"turns": 0.5}, "turns must be at least 1"),
        ({"path": Path("x")}, "tiny-live takes no path"),
    ],
)
def test_bad_recipes_are_one_line(options, said):
    with pytest.raises(WorkloadError, match=said) as caught:
        build(Recipe(source="tiny-live", **options))
    assert "\n" not in str(caught.value)


def test_the_command_writes_and_describes(tmp_path, capsys):
    out = tmp_path / "items.jsonl"
    arguments = ["tiny-live", "--requests", "40", "--rate", "4", "--cv", "2", "--seed", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    items = generate("tiny-live", 40, 4.0, 3, cv=2.0)
    assert load(out) == items
    said = capsys.readouterr().out
    assert f"40 requests in {items[-1].arrival_s:.1f} s; log-normal lengths" in said
    assert f"mean {sum(i.thinking_tokens for i in items) / 40:.0f}, median" in said
    assert str(out) in said


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
    return json.dumps({"text": "x", "meta_info": meta}).encode()


def test_every_token_of_an_event_gets_its_time():
    seen = Record(0.0)
    note_event(seen, event(1, 1), 0.5)
    note_event(seen, event(4, 2), 0.7)
    note_event(seen, event(5, 2, {"type": "length"}), 0.9)
    assert seen.token_s == [0.5, 0.7, 0.7, 0.7, 0.9]
    assert seen.answer_s == [0.7, 0.7, 0.9]
    assert seen.finished
    assert seen.error is None


def test_aborts_and_errors_are_kept():
    aborted, failed = Record(0.0), Record(0.0)
    note_event(aborted, event(1, 1, {"type": "abort", "message": "full"}), 0.5)
    note_event(failed, b'{"error": {"message": "bad"}}', 0.5)
    assert aborted.error == "abort: full"
    assert "bad" in failed.error
    assert not aborted.finished
    assert not failed.finished
