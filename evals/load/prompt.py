"""The prompt of an item: text or token ids, the same ones every time.

A later turn sends what its conversation has said so far and then its own part. What the model
thought is left out of that, as chat templates do.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals.load.items import Item

PROMPT_VOCABULARY = 256
TURN_BREAK = "\n\n"


def prompt_ids(index: int, length: int, seed: int) -> list[int]:
    """Ids of prompt `index`: it opens with its own number, so no two prompts share a prefix."""
    rng = random.Random(seed * 1_000_003 + index)
    head = [index % PROMPT_VOCABULARY, index // PROMPT_VOCABULARY % PROMPT_VOCABULARY]
    return (head + [rng.randrange(PROMPT_VOCABULARY) for _ in range(length)])[: max(length, 2)]


@functools.lru_cache(maxsize=4096)
def block_ids(name: int, length: int, seed: int) -> tuple[int, ...]:
    """Ids of a block that prompts share."""
    rng = np.random.default_rng([seed, name])
    return tuple(rng.integers(0, PROMPT_VOCABULARY, length).tolist())


def new_part(item: Item, index: int, seed: int) -> str | list[int]:
    """What the item adds to its conversation. `index` and `seed` draw it where it says nothing."""
    if isinstance(item.prompt, str):
        return item.prompt
    if item.prompt is not None:
        return list(item.prompt)
    seed, index = item.draw or (seed, index)
    shared: list[int] = []
    for name in item.hash_ids:
        shared.extend(block_ids(name, item.block_tokens, seed))
    own = prompt_ids(index, max(0, item.new_tokens - len(shared)), seed)
    return (shared + own)[: max(item.new_tokens, 2)]


@dataclass(slots=True)
class Reply:
    """The output of one request, put together from its events."""

    text: str = ""
    ids: list[int] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Events hold all of the output so far, or with incremental streaming what is new."""
        ids, text = event.get("output_ids") or [], event.get("text") or ""
        whole = len(ids) == event["meta_info"]["completion_tokens"] or not ids
        self.ids = ids if whole else self.ids + ids
        self.text = text if whole else self.text + text


@dataclass(slots=True)
class Conversation:
    """What has been said, as text or as ids, whichever its first prompt was."""

    end_of_thinking: str
    said: str | list[int] | None = None

    def ask(self, new: str | Sequence[int]) -> str | list[int]:
        """The whole prompt with this new part."""
        if isinstance(new, str):
            before = f"{self.said}{TURN_BREAK}" if self.said else ""
            self.said = before + new
        else:
            before_ids = self.said if isinstance(self.said, list) else []
            self.said = [*before_ids, *new]
        return self.said

    def answered(self, reply: Reply, reasoning_tokens: int) -> None:
        """Add the answer without the thinking before it."""
        if isinstance(self.said, str):
            self.said += reply.text.rpartition(self.end_of_thinking)[2]
        elif self.said is not None:
            self.said = self.said + reply.ids[reasoning_tokens:]
