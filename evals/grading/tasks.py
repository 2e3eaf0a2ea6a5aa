"""The data sets whose answers can be graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evals.grading import code_answers, math_answers
from evals.grading.grades import Task
from evals.sources import questions

Maker = Callable[[str, str, Mapping[str, Any], str], Task]

MAKERS: dict[str, Maker] = {
    "gsm8k": math_answers.task,
    "math-500": math_answers.task,
    "aime": math_answers.task,
    "humaneval": code_answers.humaneval,
    "mbpp": code_answers.mbpp,
}
CODE = ("humaneval", "mbpp")


def load(name: str, path: Path | None, limit: int | None) -> list[Task]:
    """The first `limit` questions of a data set, all by default, in its own order and named by
    their place in it. `path` None fetches it from the hub. Raises WorkloadError."""
    known, make = questions.DATA_SETS[name], MAKERS[name]
    rows = questions.rows(path, known)[:limit]
    return [
        make(f"{name}-{place}", questions.prompt(row, known, where), row, where)
        for place, (where, row) in enumerate(rows)
    ]
