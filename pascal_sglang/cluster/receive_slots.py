"""The slots of a receive buffer, and which of them a source may still write into.

| slot | on | becomes |
|---|---|---|
| free | `take` | taken by a move |
| taken | the move is over, and its source said that it writes no more | free |
| taken | the move is over | in doubt |
| in doubt | its source says so after all | free |
| in doubt | its source has died, `DEAD_S` seconds ago | free |

Time alone frees no slot: a source that was stopped in the middle of a write goes on with it
whenever it is continued. So the source of a slot in doubt is asked again and again, and a receive
buffer with all its slots in doubt or taken grants nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Seconds until a source is asked for the first time; twice as many each time, up to the second.
ASK_S = 1.0
ASK_AT_MOST_S = 60.0
# How long bytes of a source that has died may still be on their way, in seconds.
DEAD_S = 10.0


@dataclass(slots=True)
class _Doubt:
    """sender: the instance that may still write. ask_at, free_at: when, in seconds."""

    slot: int
    sender: int
    ask_at: float
    wait: float = ASK_S
    free_at: float = float("inf")


class ReceiveSlots:
    """`count` slots, by number; a slot in doubt goes by the name of its last move."""

    def __init__(self, count: int) -> None:
        self._free = deque(range(count))
        self._in_doubt: dict[str, _Doubt] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def in_doubt(self) -> int:
        return len(self._in_doubt)

    def take(self) -> int:
        """A free slot. Raises: IndexError without one."""
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        """No source writes into the slot any more."""
        self._free.append(slot)

    def doubt(self, slot: int, migration: str, sender: int, now: float, *, dead: bool) -> None:
        """The move is over, and its source may still write. dead: it has died."""
        free_at = now + DEAD_S if dead else float("inf")
        self._in_doubt[migration] = _Doubt(slot, sender, now + ASK_S, free_at=free_at)

    def confirmed(self, migration: str, sender: int) -> None:
        """The move's source writes no more."""
        doubt = self._in_doubt.get(migration)
        if doubt is not None and doubt.sender == sender:
            del self._in_doubt[migration]
            self._free.append(doubt.slot)

    def died(self, sender: int, now: float) -> None:
        """The instance is no more."""
        for doubt in self._in_doubt.values():
            if doubt.sender == sender:
                doubt.free_at = min(doubt.free_at, now + DEAD_S)

    def tick(self, now: float) -> list[tuple[int, str]]:
        """Time has passed: the sources to ask now, each with its move."""
        for migration, doubt in list(self._in_doubt.items()):
            if now >= doubt.free_at:
                self.confirmed(migration, doubt.sender)
        due = [
            (migration, doubt) for migration, doubt in self._in_doubt.items() if now >= doubt.ask_at
        ]
        for _, doubt in due:
            doubt.wait = min(2 * doubt.wait, ASK_AT_MOST_S)
            doubt.ask_at = now + doubt.wait
        return [(doubt.sender, migration) for migration, doubt in due]
