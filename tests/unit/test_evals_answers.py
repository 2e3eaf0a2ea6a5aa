"""Grading: programs against their tests, mathematics against the right answer."""

import json
import sys

import pytest

from evals.grading import math_answers, tasks
from evals.grading.code_answers import extract
from evals.load.lines import WorkloadError

needs_sgl_eval = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="sgl-eval installs there with a compiler only"
)

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 4]) == 5\n",
}
MBPP = {
    "prompt": "Write a function to double a number.",
    "test": ["assert double(2) == 4", "assert double(0) == 0"],
}
MBPP_OF_THE_HUB = {
    "text": "Write a function to double a number.",
    "test_imports": ["import math"],
    "test_setup_code": "four = double(2)",
    "test_list": ["assert double(math.floor(2.5)) == four", "assert four == 4"],
}


def load(tmp_path, dataset, *rows):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks.load(dataset, path, None)


def fenced(code, language="python"):
    return f"Here you are:\n\n```{language}\n{code}\n```\nIt works."


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        (fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1", ""), "x = 1\n"),
        (fenced("x = 1", "Python"), "x = 1\n"),
        (fenced("x = 1") + fenced("x = 2"), "x = 2\n"),
        (fenced("x = 1") + fenced("run it", "bash"), "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
        ("", ""),
    ],
)
def test_code_is_taken_from_the_last_python_block(answer, code):
    assert extract(answer) == code


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("def total(xs: List[int]) -> int:\n    return sum(xs)", None),
        ("    return sum(xs)", None),
        ("from __future__ import annotations\ndef total(xs: Later) -> int: return sum(xs)", None),
        ("def total(xs): return sum(xs)\nif __name__ == '__main__': print(total(input()))", None),
        ("def total(xs): return 3", "AssertionError"),
        ("def total(xs) return", "SyntaxError: expected ':'"),
        ("def total(xs): exit()", "ended before its tests, exit 0"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9"),
    ],
)
def test_humaneval_runs_its_tests(tmp_path, code, note):
    (task,) = load(tmp_path, "humaneval", HUMANEVAL)
    grade = task.grade(fenced(code))
    assert (grade.correct, grade.note) == (note is None, note or "")
    assert grade.found == code + "\n"
    assert "def total(xs: List[int]) -> int:" in task.prompt


@pytest.mark.parametrize("row", [MBPP, MBPP_OF_THE_HUB])
def test_mbpp_runs_its_tests(tmp_path, row):
    (task,) = load(tmp_path, "mbpp", row)
    assert task.grade(fenced("def double(x): return 2 * x")).correct
    assert not task.grade(fenced("def double(x): return x")).correct
    assert not task.grade("I cannot.").correct
    # Only the tests say what the function is called.
    assert "assert double(" in task.prompt


@pytest.mark.parametrize(
    ("dataset", "row", "said"),
    [
        ("humaneval", {**HUMANEVAL, "entry_point": "a b"}, "entry_point is not a name"),
        ("humaneval", {**HUMANEVAL, "test": None}, "no text in field test"),
        ("mbpp", {"prompt": "p", "test": []}, "no tests in field test"),
        ("mbpp", {"prompt": "p"}, "no tests in field test_list"),
        ("gsm8k", {"question": "q"}, "no answer in field answer"),
        ("gsm8k", {"question": "q", "answer": "#### "}, "no answer in field answer"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "no prompt in field question"),
    ],
)
def test_a_row_that_cannot_be_graded_is_named(tmp_path, dataset, row, said):
    with pytest.raises(WorkloadError, match=rf"set\.jsonl:1: {said}"):
        load(tmp_path, dataset, row)


def test_the_first_questions_in_order(tmp_path):
    load(tmp_path, "mbpp", *[{**MBPP, "prompt": f"p{i}"} for i in range(4)])
    first, second = tasks.load("mbpp", tmp_path / "set.jsonl", 2)
    assert (first.name, second.name) == ("mbpp-0", "mbpp-1")
    assert second.prompt.startswith("p1\n")


@needs_sgl_eval
@pytest.mark.parametrize(
    ("dataset", "row", "right"),
    [
        ("gsm8k", {"question": "q", "answer": "2 + 2 = 4\n#### 1,234"}, "1234"),
        ("math-500", {"problem": "q", "answer": "\\frac{1}{2}"}, "0.5"),
        ("math-500", {"problem": "q", "answer": "(r+5)^2"}, "(r+5)(r+5)"),
        ("aime", {"problem": "q", "answer": 33}, "033"),
        ("aime", {"Problem": "q", "Answer": "33"}, "33"),
    ],
)
def test_mathematics_is_compared_by_its_meaning(tmp_path, dataset, row, right):
    (task,) = load(tmp_path, dataset, row)
    assert task.prompt.endswith("\n\nq")
    assert "\\boxed{}" in task.prompt
    assert task.grade(f"So it is $\\boxed{{{right}}}$.") == (True, right, "")
    assert task.grade("So it is \\boxed{7}.") == (False, "7", "")
    assert task.grade(f"So it is {right}.") == (False, None, "nothing in \\boxed{}")


@needs_sgl_eval
def test_a_grader_that_fails_calls_the_answer_wrong(tmp_path, monkeypatch):
    (task,) = load(tmp_path, "aime", {"problem": "q", "answer": "33"})

    async def fail(point):
        raise RecursionError("too deep")

    monkeypatch.setattr(math_answers._sgl_eval().evaluator, "eval_single", fail)
    assert task.grade("\\boxed{33}") == (False, None, "grader failed: RecursionError: too deep")
