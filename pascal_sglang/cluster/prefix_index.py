"""Which instance holds which prefix, as far as the controller sent it there or heard of it."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from pascal_sglang.policy.prefix_namespace import PLAIN, Namespace

BLOCK_TOKENS = 64
CAPACITY = 1 << 16
# A block that came this often is common to several conversations.
COMMON = 3


def block_names(
    ids: Sequence[int], namespace: Namespace = PLAIN, block_tokens: int = BLOCK_TOKENS
) -> Iterator[int]:
    """A name for the text up to the end of each whole block of `block_tokens`; the same in every
    process, below 2**48."""
    # Neither of the two can be mistaken for a part of the other, and every text has a form.
    name = blake2b(repr(tuple(namespace)).encode(), digest_size=6).digest()
    packed = array("q", ids)
    for begin in range(0, len(packed) - block_tokens + 1, block_tokens):
        block = packed[begin : begin + block_tokens].tobytes()
        name = blake2b(name + block, digest_size=6).digest()
        yield int.from_bytes(name, "big")


class PrefixIndex:
    """A bounded memory of blocks (`block_names`), the least recently seen forgotten first.

    A guess: the instance may have evicted them. It is used to weigh, never to rely on.
    """

    def __init__(self, block_tokens: int = BLOCK_TOKENS, capacity: int = CAPACITY) -> None:
        self.block_tokens = block_tokens
        self.capacity = capacity
        # Per block: its holders, and how often it was sent.
        self._held: OrderedDict[int, tuple[frozenset[int], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hits(self, blocks: Iterable[int]) -> dict[int, int]:
        """Tokens of a prompt's beginning that each instance probably holds."""
        found: dict[int, int] = {}
        candidates: frozenset[int] | None = None
        for number, block in enumerate(blocks, start=1):
            held = self._held.get(block)
            if held is None:
                break
            candidates = held[0] if candidates is None else candidates & held[0]
            if not candidates:
                break
            for index in candidates:
                found[index] = number * self.block_tokens
        return found

    def sent(self, index: int, blocks: Iterable[int]) -> None:
        """A prompt went to an instance, whole."""
        for block in blocks:
            holders, times = self._held.get(block, (frozenset(), 0))
            self._note(block, holders | {index}, times + 1)

    def ended(self, index: int, blocks: Iterable[int]) -> None:
        """A conversation's turn has ended on an instance, which holds these blocks now. If it came
        from elsewhere, its next turn is to find it here: what is its alone is forgotten there."""
        for block in blocks:
            holders, times = self._held.get(block, (frozenset(), 0))
            common = times >= COMMON
            self._note(block, holders | {index} if common else frozenset({index}), times)

    def forget(self, index: int) -> None:
        """The instance holds nothing any more."""
        for block, (holders, times) in list(self._held.items()):
            if index in holders:
                self._held[block] = (holders - {index}, times)

    def _note(self, block: int, holders: frozenset[int], times: int) -> None:
        self._held[block] = (holders, times)
        self._held.move_to_end(block)
        while len(self._held) > self.capacity:
            self._held.popitem(last=False)
