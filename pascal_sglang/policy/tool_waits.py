"""Conversations whose last reply called tools: which request goes on with one, and for how long
it is worth keeping its KV.

The time is learnt from the conversations that went on: a quantile of how long they waited for their
tools. One that waits longer is remembered without its KV, so that long waits are learnt too.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any

# Of the waits seen, the share within which KV is kept.
QUANTILE = 0.95
# Waits that are remembered, and how many of them it takes to go by them.
MOST_SEEN = 256
LEAST_SEEN = 8
# Until then, in seconds.
FIRST_KEEP_S = 60.0
# Bounds of the time that KV is kept, in seconds. After the longer one a conversation is forgotten.
LEAST_KEEP_S = 1.0
MOST_KEEP_S = 600.0
# Conversations remembered at a time.
MOST_CONVERSATIONS = 512
# Tokens at the end of a prompt that may only open the reply: templates write others there once the
# reply is part of the conversation. Qwen3 and the demo's leave out `<think>\n` then, or
# `<think>\n\n</think>\n\n`; DeepSeek-R1 `<think>\n`; gpt-oss nothing.
OPENING = 8
# Bytes of a digest of tokens.
DIGEST = 16


class WaitTimes:
    """How long conversations have waited for their tools lately."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._in_order: list[float] = []

    def learn(self, waited_s: float) -> None:
        """A conversation went on after `waited_s`. What is no time is not learnt."""
        if not 0 <= waited_s < math.inf:
            return
        if len(self._recent) == MOST_SEEN:
            del self._in_order[bisect_left(self._in_order, self._recent.popleft())]
        self._recent.append(waited_s)
        insort(self._in_order, waited_s)

    @property
    def keep_s(self) -> float:
        """For how long KV is kept from the end of a reply on, in seconds."""
        seen = len(self._in_order)
        if seen < LEAST_SEEN:
            return FIRST_KEEP_S
        return bounded(self._in_order[math.ceil(QUANTILE * seen) - 1])


@dataclass(slots=True, eq=False)
class Conversation:
    """One whose last reply called tools."""

    # Its tokens: the prompt, of which there are `prompt`, and the reply.
    ids: array[int]
    prompt: int
    # KV is shared only inside of it (LoRA adapter, cache salt and so on).
    namespace: Hashable
    # When the reply ended, and until when KV is kept, in seconds of the pass clock; and whether the
    # request said so, which teaches nothing of tools.
    since: float
    until: float
    asked: bool = False
    # The requests that go on with it and wait to start, and when the last of them came.
    turns: list[Hashable] = field(default_factory=list)
    claimed: float = 0.0
    # Whether one ever did.
    went_on: bool = False
    # Whether the time is over.
    expired: bool = False
    # The engine's: host memory for its KV, how many tokens are there, how many with those on their
    # way, and whether that is all that can be had.
    copy: Any = field(default=None, repr=False)
    kept: int = 0
    begun: int = 0
    saved: bool = False

    @property
    def least(self) -> int:
        """Tokens that a prompt has to begin with."""
        return max(1, self.prompt - OPENING)


# By namespace and number of tokens that a prompt has to begin with, the conversations by a digest
# of these tokens.
Index = dict[Hashable, dict[int, dict[bytes, dict[Conversation, None]]]]


class ToolWaits:
    """The conversations that wait, in the order of their replies."""

    def __init__(self) -> None:
        self.times = WaitTimes()
        self._waiting: dict[Conversation, None] = {}
        self._index: Index = {}
        self._by_turn: dict[Hashable, Conversation] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(tuple(self._waiting))

    def replied(
        self,
        ids: array[int],
        prompt: int,
        namespace: Hashable,
        now: float,
        asked_s: float | None = None,
    ) -> list[Conversation]:
        """A reply called tools. asked_s: for how long its KV is to be kept, where that is asked
        for. Returns the conversations forgotten in its favour: those first that are worth least."""
        keep_s = self.times.keep_s if asked_s is None else bounded(asked_s)
        made = Conversation(ids, prompt, namespace, now, now + keep_s, asked_s is not None)
        forgotten = []
        while len(self._waiting) >= MOST_CONVERSATIONS:
            least = min(self._waiting, key=lambda each: (not each.expired, each.copy is not None))
            forgotten.append(least)
            self.remove(least)
        self._waiting[made] = None
        by_length = self._index.setdefault(namespace, {})
        by_digest = by_length.setdefault(made.least, {})
        by_digest.setdefault(digest_of(ids[: made.least]), {})[made] = None
        return forgotten

    def arrived(
        self, turn: Hashable, ids: array[int], namespace: Hashable, now: float
    ) -> Conversation | None:
        """A request has come; the conversation that it goes on with, if there is one. turn: the
        request itself; ids may be used again."""
        found = self._goes_on(ids, namespace, now)
        if found is None:
            return None
        # It waits for its turn now, not for a tool.
        found.claimed = now
        found.turns.append(turn)
        self._by_turn[turn] = found
        return found

    def elsewhere(self, ids: array[int], namespace: Hashable, now: float) -> Conversation | None:
        """The next turn of a conversation is not here. The one that it goes on with, which is
        removed; None if there is none, or if a request that waits here goes on with it, too."""
        found = self._goes_on(ids, namespace, now)
        if found is None or found.turns:
            return None
        self.remove(found)
        return found

    def left(self, turn: Hashable) -> Conversation | None:
        """A request has left, and goes on on another instance. The conversation that it went on
        with, which is removed; None if there is none, or if another request goes on with it."""
        found = self._by_turn.pop(turn, None)
        if found is None:
            return None
        found.turns.remove(turn)
        if found.turns:
            return None
        self.remove(found)
        return found

    def _goes_on(self, ids: array[int], namespace: Hashable, now: float) -> Conversation | None:
        """The conversation that a prompt goes on with. How long it has waited is learnt, once."""
        best, found = (0, False), None
        for each in self._beginning(ids, namespace):
            if goes_on_with(each, ids):
                rank = shared_tokens(each.ids, ids), not each.turns
                if rank >= best:
                    best, found = rank, each
        if found is None:
            return None
        if not found.went_on and not found.asked:
            self.times.learn(now - found.since)
        found.went_on = True
        return found

    def _beginning(self, ids: array[int], namespace: Hashable) -> Iterator[Conversation]:
        """The conversations that a prompt begins with, but for their openings."""
        by_length = self._index.get(namespace, {})
        digest, read = blake2b(digest_size=DIGEST), 0
        for least in sorted(by_length):
            if least > len(ids):
                return
            digest.update(ids[read:least])
            read = least
            yield from by_length[least].get(digest.digest(), ())

    def of(self, turn: Hashable) -> Conversation | None:
        """The conversation that a request goes on with."""
        return self._by_turn.get(turn)

    def release(self, has_left: Callable[[Any], bool]) -> None:
        """Requests that went on with a conversation and have left without a start do so no more."""
        for turn in [turn for turn in self._by_turn if has_left(turn)]:
            self._by_turn.pop(turn).turns.remove(turn)

    def expire(self, now: float) -> list[Conversation]:
        """Those whose KV is not kept any more, from now on. They are remembered for as long as they
        may still teach how long waits are."""
        late = []
        for each in tuple(self._waiting):
            until = each.claimed + MOST_KEEP_S if each.turns else each.until
            if now >= until and not each.expired:
                each.expired = True
                late.append(each)
            teaches = not each.went_on and not each.asked and now < each.since + MOST_KEEP_S
            if each.expired and not teaches:
                self.remove(each)
        return late

    def remove(self, conversation: Conversation) -> None:
        del self._waiting[conversation]
        for turn in conversation.turns:
            del self._by_turn[turn]
        least, namespace = conversation.least, conversation.namespace
        digest = digest_of(conversation.ids[:least])
        by_length = self._index[namespace]
        del by_length[least][digest][conversation]
        # Nothing empty stays behind: namespaces may be as many as requests.
        if not by_length[least][digest]:
            del by_length[least][digest]
        if not by_length[least]:
            del by_length[least]
        if not by_length:
            del self._index[namespace]

    def forget(self, matches: Callable[[Any], bool]) -> list[Conversation]:
        """Remove those that requests go on with which `matches`; returns them."""
        found = [each for each in self._waiting if any(map(matches, each.turns))]
        for each in found:
            self.remove(each)
        return found


def bounded(seconds: float) -> float:
    return min(max(seconds, LEAST_KEEP_S), MOST_KEEP_S)


def digest_of(ids: array[int]) -> bytes:
    return blake2b(ids, digest_size=DIGEST).digest()


def goes_on_with(conversation: Conversation, ids: array[int]) -> bool:
    """Whether a prompt is longer than the conversation's and begins with all of it, but for an
    opening of the reply, with which it ends itself: a template opens all replies alike."""
    prompt = conversation.prompt
    if len(ids) <= prompt:
        return False
    shared = min(shared_tokens(conversation.ids, ids), prompt)
    opening = conversation.ids[shared:prompt]
    return shared >= conversation.least and ids[len(ids) - len(opening) :] == opening


def shared_tokens(one: array[int], other: array[int]) -> int:
    """With how many equal tokens the two begin."""
    # Slices of arrays are compared whole, unlike views of them.
    equal, most = 0, min(len(one), len(other))
    while equal < most:
        middle = (equal + most + 1) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            most = middle - 1
    return equal


def distinct_tokens(many: Iterable[array[int]]) -> int:
    """How many tokens a prefix cache has of these together: what several begin with counts once."""
    ordered = sorted(many)
    shared = sum(shared_tokens(one, other) for one, other in pairwise(ordered))
    return sum(map(len, ordered)) - shared
