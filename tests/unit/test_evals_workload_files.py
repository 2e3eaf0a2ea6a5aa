"""Workloads on disk: exact, and clear about what is wrong with a bad file."""

import json

import pytest

from evals.load.client import request_body
from evals.load.items import Item, load, save
from evals.load.lines import WorkloadError
from evals.workload import Recipe, build, generate

ITEM = {"arrival_s": 1.5, "prompt_tokens": 8, "thinking_tokens": 3, "answer_tokens": 4}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_files_hold_items_exactly(tmp_path):
    trace = write(
        tmp_path / "trace.jsonl",
        {"timestamp": 0, "input_length": 1000, "output_length": 9, "hash_ids": [7, 8]},
    )
    questions = write(tmp_path / "set.jsonl", {"question": 'Why?\n"é" \u2028'})
    for items in (
        generate("alpacaeval", 200, 0.3, 5),
        build(Recipe(source="servegen-r1", turns=3.0)),
        build(Recipe(source="mooncake", path=trace, prompt_scale=0.5)),
        build(Recipe(source="gsm8k", path=questions, requests=5)),
        [Item(0.1, 3, 1, 1, prompt=(5, 6, 7), pause_s=0.0)],
    ):
        save(items, tmp_path / "items.jsonl")
        assert load(tmp_path / "items.jsonl") == items


def test_files_of_the_first_version_still_load(tmp_path):
    (item,) = load(write(tmp_path / "items.jsonl", ITEM))
    assert item == Item(1.5, 8, 3, 4)
    body = request_body(item, 0, 0, "p")
    assert body["input_ids"] == request_body(Item(1.5, 8, 3, 4), 0, 0, "p")["input_ids"]


def test_a_loaded_workload_sends_the_same_prompts_with_any_seed(tmp_path):
    items = build(Recipe(source="tiny-live", requests=20, seed=4))
    save(items, tmp_path / "items.jsonl")
    loaded = load(tmp_path / "items.jsonl")
    # The place in the list does not matter either: the last five alone are the same.
    for number, item in enumerate(loaded[15:]):
        assert request_body(item, number, 99, "p") == request_body(items[15 + number], 0, 0, "p")


def test_defaults_are_not_written(tmp_path):
    save([Item(1.5, 8, 3, 4)], tmp_path / "items.jsonl")
    assert json.loads((tmp_path / "items.jsonl").read_text()) == ITEM


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "not JSON"),
        ("3", "not a JSON object"),
        ({**ITEM, "colour": 1}, "unknown field colour"),
        ({"arrival_s": 0.0, "prompt_tokens": 3}, "missing field answer_tokens, thinking_tokens"),
        ({**ITEM, "answer_tokens": 0}, "answer_tokens and block_tokens must be positive"),
        ({**ITEM, "answer_tokens": 1.5}, "bad answer_tokens: '1.5'"),
        ({**ITEM, "answer_tokens": True}, "bad answer_tokens: 'True'"),
        ({**ITEM, "arrival_s": "now"}, "bad arrival_s: 'now'"),
        ({**ITEM, "arrival_s": None}, "bad arrival_s: 'None'"),
        ({**ITEM, "arrival_s": float("nan")}, "times must be finite"),
        ({**ITEM, "arrival_s": -1}, "must not be negative"),
        ({**ITEM, "prompt": [1, "x"]}, "bad prompt"),
        ({**ITEM, "prompt": [1, 2]}, "as long as prompt_tokens"),
        ({**ITEM, "draw": [1]}, "bad draw"),
        ({**ITEM, "history_tokens": 8}, "prompt_tokens must be more than history_tokens"),
        ({**ITEM, "turn": 1}, "a later turn needs its conversation"),
        ({**ITEM, "conversation": 5, "turn": 1}, "turn 1 of conversation 5, not 0"),
        (
            {**ITEM, "conversation": 0, "turn": 1, "prompt": "x"},
            "conversation 0 mixes text and ids",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "items.jsonl", {**ITEM, "conversation": 0}, "", line)
    with pytest.raises(WorkloadError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(WorkloadError, match=r"none\.jsonl: No such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(WorkloadError, match=r"items\.jsonl: no requests in it"):
        load(write(tmp_path / "items.jsonl", ""))
    (tmp_path / "items.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"items\.jsonl: not UTF-8 text"):
        load(tmp_path / "items.jsonl")
    with pytest.raises(WorkloadError, match="Is a directory"):
        load(tmp_path)
