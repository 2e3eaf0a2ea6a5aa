"""Programs: what HumanEval and MBPP ask for, and whether the code of an answer passes its tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from evals.grading import sandbox
from evals.grading.grades import Grade
from evals.load.lines import WorkloadError

# A block that the end of the answer cuts off still counts. The marker may name the language.
_BLOCK = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LANGUAGES = {"", "python", "python3", "py"}
_FUTURE = re.compile(r"^from __future__ import .*$\n?", re.MULTILINE)

# As in HumanEval's own harness, an answer is no main program: what it would do as one, asking for
# input perhaps, is not what is tested. Dataclasses look their module up by its name.
_START = (
    "__import__('sys').modules['answer'] = __import__('sys').modules[__name__]; "
    "__name__ = 'answer'\n"
)
# Only the end of the tests ends a program this way: one that exits by itself has passed nothing.
PASSED = 99
_END = f"\n__import__('os')._exit({PASSED})\n"


@dataclass(frozen=True, slots=True)
class CodeTask:
    """before, after: source in front of the answer's code and behind it, its tests."""

    name: str
    prompt: str
    before: str
    after: str
    any_thread: ClassVar[bool] = True

    def program(self, code: str) -> str:
        """The whole program; imports from `__future__` come first, as the language wants it."""
        source = f"{self.before}\n{code}\n{self.after}{_END}"
        return "".join(_FUTURE.findall(source)) + _START + _FUTURE.sub("", source)

    def grade(self, answer: str) -> Grade:
        """Raises SandboxError where nothing can be run."""
        code = extract(answer)
        seen = sandbox.run(self.program(code))
        return Grade(seen.status == PASSED, code, _why(seen))


def humaneval(name: str, prompt: str, row: Mapping[str, Any], where: str) -> CodeTask:
    """The prompt is the head of a function; in front of the answer it brings imports and helpers,
    and an answer that is only the function's body continues it."""
    entry = _text(row, "entry_point", where)
    if not entry.isidentifier():
        raise WorkloadError(f"{where}: entry_point is not a name: {entry[:40]!r}")
    ask = (
        "Complete this Python function. Answer with the whole function in one Python code block.\n"
        f"\n```python\n{prompt.strip()}\n```\n"
    )
    return CodeTask(name, ask, prompt, f"{_text(row, 'test', where)}\ncheck({entry})")


def mbpp(name: str, prompt: str, row: Mapping[str, Any], where: str) -> CodeTask:
    """Its tests are part of the question: only they say what the function is called."""
    field = next((f for f in ("test_list", "test") if f in row), "test_list")
    tests = row.get(field)
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise WorkloadError(f"{where}: no tests in field {field}")
    # After the answer: the set-up of a test may use what the answer defines.
    setup = [*(row.get("test_imports") or ()), row.get("test_setup_code") or ""]
    ask = (
        f"{prompt.strip()}\nAnswer with one Python code block. Your code must pass these tests:\n"
        "\n```python\n" + "\n".join(tests) + "\n```\n"
    )
    return CodeTask(name, ask, "", "\n".join([*setup, *tests]))


def extract(answer: str) -> str:
    """The last Python code block of an answer, or all of it where there is none."""
    blocks = [code for language, code in _BLOCK.findall(answer) if language.lower() in _LANGUAGES]
    return str(blocks[-1]) if blocks else answer


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise WorkloadError(f"{where}: no text in field {field}")
    return value


def _why(seen: sandbox.Outcome) -> str:
    if seen.status == PASSED:
        return ""
    if seen.status is None:
        return "ran out of time"
    if seen.status > 128:
        return f"killed by signal {seen.status - 128}"
    last = (seen.output.strip().splitlines() or [""])[-1][:200]
    return last if seen.status == 1 and last else f"ended before its tests, exit {seen.status}"
