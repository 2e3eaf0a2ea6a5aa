"""What grading an answer gives, and what can be asked and graded."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol


class Grade(NamedTuple):
    """found: what was taken from the answer to be judged, None where nothing was. note: what was
    wrong with it."""

    correct: bool
    found: str | None
    note: str


class Task(Protocol):
    """One question of a data set. any_thread: whether `grade` may be called from any thread."""

    any_thread: ClassVar[bool]

    @property
    def name(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    def grade(self, answer: str) -> Grade: ...
