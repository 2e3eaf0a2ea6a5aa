"""Which instance holds which prompt prefix, as far as this controller sent it there."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 64
CAPACITY = 1 << 16


class Prefixes:
    """A bounded memory of prompt blocks, the least recently seen forgotten first.

    A guess: the instance may have evicted them. It is used to weigh, never to rely on.
    """

    def __init__(self, block_tokens: int = BLOCK_TOKENS, capacity: int = CAPACITY) -> None:
        self.block_tokens = block_tokens
        self.capacity = capacity
        self._held: OrderedDict[int, set[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hits(self, ids: Sequence[int], salt: str | None = None) -> dict[int, int]:
        """Tokens of the prompt's beginning that each instance has been sent before."""
        found: dict[int, int] = {}
        candidates: set[int] | None = None
        for number, block in enumerate(self._blocks(ids, salt), start=1):
            holders = self._held.get(block)
            if holders is None:
                break
            candidates = set(holders) if candidates is None else candidates & holders
            if not candidates:
                break
            for index in candidates:
                found[index] = number * self.block_tokens
        return found

    def sent(self, index: int, ids: Sequence[int], salt: str | None = None) -> None:
        """The prompt went to an instance, whole."""
        for block in self._blocks(ids, salt):
            self._held.setdefault(block, set()).add(index)
            self._held.move_to_end(block)
        while len(self._held) > self.capacity:
            self._held.popitem(last=False)

    def _blocks(self, ids: Sequence[int], salt: str | None) -> Iterator[int]:
        """A name for the prompt up to the end of each whole block."""
        name = hash(salt)
        packed = array("q", ids)
        for begin in range(0, len(packed) - self.block_tokens + 1, self.block_tokens):
            name = hash((name, packed[begin : begin + self.block_tokens].tobytes()))
            yield name
