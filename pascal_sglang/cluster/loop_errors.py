"""Errors that must not end a loop: counted by what was going on, the first ones logged."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# Errors of one kind that are logged; all are counted.
LOGGED = 5


class LoopErrors:
    """counts: errors by what was going on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, doing: str, error: BaseException) -> None:
        """Count and maybe log an error that was caught. doing: a few words of ours."""
        self.counts[doing] += 1
        if self.counts[doing] <= LOGGED:
            logger.error("pascal_sglang: error in %s", doing, exc_info=error)

    @contextmanager
    def kept(self, doing: str) -> Iterator[None]:
        """Whatever fails inside is noted, and goes no further."""
        try:
            yield
        except Exception as error:
            self.note(doing, error)
