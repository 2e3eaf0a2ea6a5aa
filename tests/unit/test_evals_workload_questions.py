"""Prompts of public data sets, from a file and from a hub that is not there."""

import json
import sys
from types import SimpleNamespace

import pytest

from evals.load.lines import WorkloadError
from evals.workload import Recipe, build, main


def outputs(items):
    return [item.output_tokens for item in items]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("math-500", {"problem": "the prompt", "solution": "no"}),
        ("gsm8k", {"question": "the prompt", "answer": "no"}),
        ("aime", {"id": 60, "problem": "the prompt", "answer": "204"}),
        ("aime", {"ID": "2024-II-4", "Problem": "the prompt"}),
        ("mbpp", {"prompt": "the prompt", "code": "no"}),
        ("mbpp", {"text": "the prompt", "code": "no"}),
        ("humaneval", {"task_id": "HumanEval/0", "prompt": "the prompt"}),
        ("arena-hard-questions", {"uid": "3", "prompt": "the prompt"}),
        ("arena-hard-questions", {"turns": [{"content": "the prompt"}]}),
    ],
)
def test_prompts_are_found_in_each_data_set(tmp_path, source, row):
    path = write(tmp_path / "set.jsonl", [row])
    (item,) = build(Recipe(source=source, path=path, requests=1))
    assert item.prompt == "the prompt"
    # Ten characters, at four a token.
    assert item.prompt_tokens == 2


def test_every_prompt_comes_before_any_comes_again(tmp_path):
    path = write(tmp_path / "set.jsonl", [{"question": f"q{i}"} for i in range(10)])
    asked = [i.prompt for i in build(Recipe(source="gsm8k", path=path, requests=25))]
    assert sorted(asked[:10]) == sorted(asked[10:20]) == [f"q{i}" for i in range(10)]
    assert asked[:10] != [f"q{i}" for i in range(10)]
    assert len(set(asked[20:])) == 5


def test_output_lengths_come_from_another_source(tmp_path):
    path = write(tmp_path / "set.jsonl", [{"question": "q"}])
    items = build(Recipe(source="gsm8k", path=path, lengths="tiny-live", requests=20, seed=3))
    same = build(Recipe(source="tiny-live", requests=20, seed=3))
    assert outputs(items) == outputs(same)
    for bad, said in (("mooncake", "cannot come from mooncake"), ("mbpp", "cannot come from mbpp")):
        with pytest.raises(WorkloadError, match=said):
            build(Recipe(source="gsm8k", path=path, lengths=bad))
    with pytest.raises(WorkloadError, match="has its own lengths"):
        build(Recipe(source="tiny-live", lengths="servegen-r1"))


def test_a_row_without_a_prompt_is_named(tmp_path):
    path = write(tmp_path / "set.jsonl", [{"question": "q"}, {"question": "  "}])
    with pytest.raises(WorkloadError, match=r"set\.jsonl:2: no prompt in field question"):
        build(Recipe(source="gsm8k", path=path))


def test_the_hub_is_asked_where_there_is_no_file(monkeypatch):
    def load_dataset(name, subset, split):
        assert (name, subset, split) == ("openai/gsm8k", "main", "test")
        return [{"question": "from the hub"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (item,) = build(Recipe(source="gsm8k", requests=1))
    assert item.prompt == "from the hub"


def test_no_network_is_one_line(monkeypatch, capsys):
    def load_dataset(name, subset, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert main(["gsm8k"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "evals: error: cannot fetch openai/gsm8k from the hub (no route); give a file by --path\n"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WorkloadError, match=r"pip install 'pascal_sglang\[evals\]'"):
        build(Recipe(source="gsm8k"))


def test_the_origin_of_lengths_is_said(tmp_path, capsys):
    path = write(tmp_path / "set.jsonl", [{"question": "q"}])
    assert main(["gsm8k", "--path", str(path), "--lengths", "servegen-r1"]) == 0
    said = capsys.readouterr().out
    assert (
        "prompts of gsm8k; outputs of servegen-r1: lengths sampled from ServeGen distributions"
        in said
    )
