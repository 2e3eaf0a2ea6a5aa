"""Whether two servers gave the same answers to the same questions, to the letter.

With greedy sampling they should: scheduling may change when a token comes, never which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evals.grading.scores import INTERRUPTED, Graded

NAMED = 5


@dataclass(frozen=True, slots=True)
class Parity:
    """different: questions whose thinking or answer differs, with both outcomes. failed: names of
    those that one side, or both, did not finish. unasked: those that Ctrl-C left out."""

    first: str
    second: str
    same: int
    different: tuple[str, ...]
    failed: tuple[str, ...]
    unasked: int

    @property
    def holds(self) -> bool:
        return not self.different and not self.failed

    def __str__(self) -> str:
        asked = self.same + len(self.different) + len(self.failed)
        words = f"parity {self.first} / {self.second}: {self.same} of {asked} the same"
        for names, what in ((self.different, "differ"), (self.failed, "not finished by both")):
            if names:
                more = ", ..." if len(names) > NAMED else ""
                words += f"; {len(names)} {what}: {', '.join(names[:NAMED])}{more}"
        return words + (f"; {self.unasked} interrupted" if self.unasked else "")


def compare(arms: Mapping[str, Sequence[Graded]]) -> list[Parity]:
    """Every arm after the first with the first."""
    (first, reference), *others = arms.items()
    return [_pair(first, second, reference, items) for second, items in others]


def _pair(first: str, second: str, ones: Sequence[Graded], others: Sequence[Graded]) -> Parity:
    same, unasked = 0, 0
    different: list[str] = []
    failed: list[str] = []
    for one, other in zip(ones, others, strict=True):
        name, outcomes = one.task.name, (one.outcome, other.outcome)
        if INTERRUPTED in outcomes:
            unasked += 1
        elif not (one.heard.record.finished and other.heard.record.finished):
            failed.append(name)
        elif _said(one) == _said(other):
            same += 1
        else:
            different.append(f"{name} ({' / '.join(outcomes)})")
    return Parity(first, second, same, tuple(different), tuple(failed), unasked)


def _said(item: Graded) -> tuple[str, str]:
    return item.heard.thinking, item.heard.answer
