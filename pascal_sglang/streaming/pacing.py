"""When the chunks of a streamed answer leave: the reader's pace, and how much waits at most.

Pure: time is an argument, in seconds of one clock. `pace_stream` does the waiting.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from pascal_sglang.streaming.held_chunks import Chunk, HeldChunk, Holder

# Tokens held per answer; beyond it the oldest leave early. Nobody reads this far behind, and it
# bounds the memory.
BUFFER_TOKENS = 1024


@dataclass(slots=True)
class Answer:
    """One answer's chunks not yet released: when each is due, its weight in tokens, and itself.

    tpot: seconds per answering token. seen: answering tokens so far.
    """

    number: int
    tpot: float
    held: deque[tuple[float, int, HeldChunk]] = field(default_factory=deque)
    held_tokens: int = 0
    in_line: bool = False
    _seen: int = 0
    _holder: Holder = field(default_factory=Holder)
    _last_due: float = -math.inf
    _next_due: float = -math.inf

    def add(self, now: float, chunk: Chunk) -> None:
        """Take a chunk in. It is due when its first new answering token is; without one, at once
        behind the chunk before it."""
        tokens = answer_tokens(chunk)
        # The count falls when SGLang finds out that the last tokens opened a thought.
        new = max(0, tokens - self._seen)
        self._seen = tokens
        if new:
            self._last_due = max(now, self._next_due)
            self._next_due = self._last_due + new * self.tpot
        else:
            self._last_due = max(now, self._last_due)
        weight = max(1, new)
        self.held.append((self._last_due, weight, self._holder.hold(chunk)))
        self.held_tokens += weight

    @property
    def due(self) -> float:
        """When the first of `held` is due; from one to the next it never decreases."""
        return self.held[0][0]

    def release(self) -> HeldChunk:
        _, weight, held = self.held.popleft()
        self.held_tokens -= weight
        return held


class Pacing:
    """The answers of one streamed request: several of a batch or with `n` above 1. None of them
    holds another back; each keeps its order.

    tpot_of: seconds per answering token of the answer with an index; None stands for the only one.
    """

    def __init__(self, tpot_of: Callable[[Hashable], float]) -> None:
        self._tpot_of = tpot_of
        self._answers: dict[Hashable, Answer] = {}
        # A heap of who holds chunks, under a time not later than the first of them is due.
        self._line: list[tuple[float, int, Answer]] = []
        self._early: deque[HeldChunk] = deque()

    def add(self, now: float, chunk: Chunk) -> None:
        """Take in a chunk that came at `now`, which never decreases."""
        index = chunk.get("index")
        answer = self._answers.get(index)
        if answer is None:
            answer = Answer(len(self._answers), self._tpot_of(index))
            self._answers[index] = answer
        answer.add(now, chunk)
        if not answer.in_line:
            heapq.heappush(self._line, (answer.due, answer.number, answer))
            answer.in_line = True
        # Nobody reads an aborted answer: whoever waits for it waits for its end.
        keep = 0 if is_aborted(chunk) else BUFFER_TOKENS
        while answer.held_tokens > keep:
            self._early.append(answer.release())

    @property
    def crowded(self) -> bool:
        """Chunks had to leave their place before they were due and are not taken yet."""
        return bool(self._early)

    @property
    def empty(self) -> bool:
        return not self._early and self._first() is None

    def due(self) -> float:
        """When the next chunk leaves, in seconds; infinity while nothing is held."""
        if self._early:
            return -math.inf
        first = self._first()
        return math.inf if first is None else first.due

    def release(self, now: float) -> Iterator[Chunk]:
        """Chunks that are due by `now`, those included that are added meanwhile."""
        while True:
            first = None if self._early else self._first()
            if self._early:
                yield self._early.popleft().as_it_was()
            elif first is not None and first.due <= now:
                yield first.release().as_it_was()
            else:
                return

    def _first(self) -> Answer | None:
        """Whose chunk is due first. Brings the top of the line up to date on the way."""
        while self._line:
            due, number, answer = self._line[0]
            if not answer.held:
                heapq.heappop(self._line)
                answer.in_line = False
            elif answer.due > due:
                heapq.heapreplace(self._line, (answer.due, number, answer))
            else:
                return answer
        return None


def answer_tokens(chunk: Chunk) -> int:
    """Answering tokens up to this chunk: all tokens so far less the thinking ones."""
    meta = chunk.get("meta_info") or {}
    whole, thinking = meta.get("completion_tokens") or 0, meta.get("reasoning_tokens") or 0
    return max(0, int(whole) - int(thinking))


def is_aborted(chunk: Chunk) -> bool:
    """Whether this chunk ends its answer without finishing it."""
    reason = (chunk.get("meta_info") or {}).get("finish_reason")
    return isinstance(reason, dict) and reason.get("type") == "abort"
