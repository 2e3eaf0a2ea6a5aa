"""Both tools are given the same work; what they say is compared pair by pair."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from evals.arms import load_plan
from evals.bench import agreement
from evals.bench.agreement import Load

PLAN = load_plan(Path(__file__).parents[2] / "evals" / "arms" / "ample.toml", requests=30)
OPEN = Load(5.0, None)
AT_ONCE = Load(float("inf"), 4)


def test_their_shuffle_and_their_gaps_give_our_order_and_times(tmp_path):
    wanted = agreement.requests(PLAN, OPEN)
    agreement.write_theirs(wanted, tmp_path / "theirs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "theirs.jsonl").read_text().splitlines()]
    # As `sglang.benchmark.serving` does it.
    random.seed(agreement.SEED)
    np.random.seed(agreement.SEED)
    random.shuffle(rows)
    at_s = 0.0
    for item, row in zip(wanted, rows, strict=True):
        prompt, answer = (turn["content"] for turn in row["conversations"])
        assert (prompt, len(answer)) == (item.prompt, item.output_tokens)
        assert item.arrival_s == pytest.approx(at_s)
        at_s += np.random.exponential(1.0 / OPEN.per_s)


def test_all_at_once_is_without_gaps():
    assert {item.arrival_s for item in agreement.requests(PLAN, AT_ONCE)} == {0.0}


def test_the_table_compares_pair_by_pair():
    we = [dict.fromkeys(agreement.KEYS, value) for value in (1.0, 4.0)]
    they = [dict.fromkeys(agreement.KEYS, value) for value in (2.0, 2.0)]
    lines = agreement.table(we, they)
    assert len(lines) == 1 + len(agreement.KEYS)
    assert "2.50 (1.00..4.00)" in lines[1]
    assert "1.00 (0.50..2.00)" in lines[1]


def test_other_work_is_noticed():
    same = dict.fromkeys(agreement.SAME, 3)
    assert agreement.differences([same], [same]) == []
    assert agreement.differences([same], [{**same, "output_lens": [1]}]) == ["output_lens"]


def test_bad_input_is_one_line(capsys):
    assert agreement.main(["no-such.toml"]) == agreement.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "no-such.toml" in error
    assert error.count("\n") == 1
