"""Mathematics: prompts and grading are those of `sgl-eval`, the SGLang team's own harness.

Its registry offers whole runs with a client of its own, which sees no token times; these are the
pieces such a run is made of.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from evals.grading.grades import Grade
from evals.load.lines import WorkloadError

EXPECTED = ("answer", "Answer", "expected_answer")
# What `sgl-eval` asks GSM8K and AIME with.
PROMPT = "math"


@dataclass(frozen=True, slots=True)
class MathTask:
    """A problem, as asked, and the answer that is right."""

    name: str
    prompt: str
    expected: str
    # The grader ends a comparison that takes too long by a signal, which only that thread gets.
    any_thread: ClassVar[bool] = False

    def grade(self, answer: str) -> Grade:
        """Whether the last boxed expression of `answer` equals what is expected, symbolically."""
        point = {"generation": answer, "expected_answer": self.expected}
        try:
            seen = asyncio.run(_sgl_eval().evaluator.eval_single(point))
        except Exception as error:  # Its parsers raise of every kind on what a model may write.
            return Grade(False, None, f"grader failed: {type(error).__name__}: {error}"[:200])
        found = seen["predicted_answer"]
        return Grade(bool(seen["symbolic_correct"]), found, "" if found else "nothing in \\boxed{}")


def task(name: str, problem: str, row: Mapping[str, Any], where: str) -> MathTask:
    """Raises WorkloadError for a row without its answer."""
    value = next((row[field] for field in EXPECTED if row.get(field) is not None), "")
    # GSM8K ends a worked solution with "#### 1,234".
    _, marker, expected = str(value).rpartition("####")
    expected = (expected.replace(",", "") if marker else expected).strip()
    if not expected:
        raise WorkloadError(f"{where}: no answer in field {' or '.join(EXPECTED)}")
    return MathTask(name, _sgl_eval().render(problem), expected)


class _Pieces(NamedTuple):
    """render: the prompt of a problem. evaluator: an `sgl_eval` MathEvaluator."""

    render: Callable[[str], str]
    evaluator: Any


@functools.cache
def _sgl_eval() -> _Pieces:
    """On first use, because it takes seconds to import."""
    try:
        from sgl_eval._vendored.nemo_skills.evaluator.math import MathEvaluator
        from sgl_eval.evals._math import render_math_prompt
        from sgl_eval.evals._prompts import resolve_prompt
    except ImportError as error:
        raise WorkloadError(f"mathematics needs `pip install sgl-eval` ({error})") from error
    # They warn of every answer that is no mathematics; that is what the grade says.
    for noisy in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    template = resolve_prompt(PROMPT)
    return _Pieces(functools.partial(render_math_prompt, template), MathEvaluator({}))
