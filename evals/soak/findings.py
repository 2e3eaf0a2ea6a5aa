"""What a soak found that must not be."""

from __future__ import annotations

from dataclasses import dataclass, field

EXAMPLES = 5


@dataclass(slots=True)
class Findings:
    """Counts by what is wrong, and the first few of each in words."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, example: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        told = self.examples.setdefault(what, [])
        if len(told) < EXAMPLES:
            told.append(example)

    def lines(self) -> list[str]:
        """For people."""
        return [
            line
            for what, count in sorted(self.counts.items())
            for line in (f"WRONG {what}: {count}", *(f"    {e}" for e in self.examples[what]))
        ]
