"""The source's side of a move: owner of the request until it hands it over.

| state | the request | on | goes to |
|---|---|---|---|
| ASKING | decodes here | Granted | COPYING |
| COPYING | decodes here, KV follows | little is left, or stop-and-copy | STOPPING |
| STOPPING | leaves the batch; the rest is copied | it stands still, one window is left | HANDED |
| HANDED | the target's, unless it refuses; KV kept | Mine | DONE: frees its KV |
| KEPT | goes on here | | |

Refused, a time-out, the end or abort of the request, or the target's death lead from the first
three to KEPT. The Handover is the one decision of a move. After it the source waits for the
target's word, Mine or Refused, and says it again until it hears one: silence may mean that the
target decodes already. Refused leads to KEPT; the target's death ends the request (LOST).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pascal_sglang.cluster.messages import (
    Ask,
    Cancelled,
    Chunk,
    Got,
    Granted,
    Handover,
    Message,
    Mine,
    Refused,
)


class SourceState(Enum):
    ASKING = "asking"
    COPYING = "copying"
    STOPPING = "stopping"
    HANDED = "handed"
    KEPT = "kept"
    LOST = "lost"
    DONE = "done"


OPEN = frozenset({SourceState.ASKING, SourceState.COPYING, SourceState.STOPPING})
OVER = frozenset({SourceState.KEPT, SourceState.LOST, SourceState.DONE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How moves are made. Times in seconds, lengths in tokens.

    live: copy while decoding; otherwise stop first. tail: stop once this little is left to copy.
    patience_s: without news before the Handover the request stays. repeat_s: between repetitions
    of what must be answered.
    """

    live: bool = True
    tail: int = 16
    patience_s: float = 2.0
    repeat_s: float = 0.25


@dataclass(slots=True)
class Source:
    """One move. What it returns has to be sent to the target, in order.

    reserve: KV entries asked for; the request must not outgrow them. stop: called once, when the
    request has to leave the batch. snapshot: called once, when it stands still. resume: it stays
    after a stop. release: it is the target's now. lose: it was, and the target has died.
    """

    move: str
    rid: str
    terms: Terms
    reserve: int
    stop: Callable[[], None]
    snapshot: Callable[[], dict[str, Any]]
    resume: Callable[[], None]
    release: Callable[[], None]
    lose: Callable[[], None]
    state: SourceState = SourceState.ASKING
    why: str = ""
    sent: int = 0
    acked: int = 0
    window: int = 0
    heard: float = 0.0
    _said: float = 0.0
    _handover: Handover | None = field(default=None)

    def begin(self, now: float, layout: str) -> list[Message]:
        self.heard = now
        return [Ask(self.move, self.rid, self.reserve, layout)]

    def hear(self, message: Message, now: float) -> list[Message]:
        """Take in the target's message; one that does not fit the state is ignored."""
        if isinstance(message, Mine):
            if self.state is SourceState.HANDED:
                self.state = SourceState.DONE
                self.release()
            return []
        if isinstance(message, Refused):
            if self.state is SourceState.HANDED:
                self._stay(message.why)
                return []
            return self.keep(message.why)
        if self.state not in OPEN:
            return []
        self.heard = now
        if isinstance(message, Granted) and self.state is SourceState.ASKING:
            self.state, self.window = SourceState.COPYING, message.window
        if isinstance(message, Got):
            self.acked = max(self.acked, message.upto)
        return []

    def copy(self, now: float, kv_tokens: int, *, still: bool) -> list[Message]:
        """Once per pass: the request holds `kv_tokens`, and `still` says that it has stopped and
        will hold no more. Send what is new; stop it when little is."""
        if self.state not in (SourceState.COPYING, SourceState.STOPPING):
            return []
        if self.acked < self.sent:
            return []
        left = kv_tokens - self.sent
        if self.state is SourceState.COPYING:
            if self._far_enough(kv_tokens, left):
                self.state = SourceState.STOPPING
                self.stop()
                return []
        elif not still:
            return []
        elif left <= self.window:
            return [self._hand(now, kv_tokens)]
        return [self._chunk(kv_tokens)]

    def unsent(self, why: str) -> list[Message]:
        """What `copy` has just returned could not be put into the window: the request stays."""
        if self.state is SourceState.HANDED:
            self._stay(why)
            return [Cancelled(self.move)]
        return self.keep(why)

    def tick(self, now: float) -> list[Message]:
        """Time has passed: give up waiting, or say again what must be answered."""
        if self.state in OPEN and now - self.heard > self.terms.patience_s:
            return self.keep("timeout")
        if self.state is SourceState.HANDED and now - self._said >= self.terms.repeat_s:
            assert self._handover is not None
            self._said = now
            return [self._handover]
        return []

    def keep(self, why: str) -> list[Message]:
        """The request stays, or has ended here; nothing happens once it is handed over."""
        if self.state not in OPEN:
            return []
        self._stay(why)
        return [Cancelled(self.move)]

    def target_died(self) -> None:
        """Before the Handover the request stays. After it nobody knows which tokens its reader has
        seen: it ends."""
        if self.state is SourceState.HANDED:
            self.state, self.why = SourceState.LOST, "target died"
            self.lose()
        elif self.state in OPEN:
            self._stay("target died")

    def _stay(self, why: str) -> None:
        stopped = self.state in (SourceState.STOPPING, SourceState.HANDED)
        self.state, self.why, self._handover = SourceState.KEPT, why, None
        if stopped:
            self.resume()

    def _far_enough(self, kv_tokens: int, left: int) -> bool:
        # The last of what was reserved is left for tokens that arrive while it stops.
        full = kv_tokens + 2 >= self.reserve
        return not self.terms.live or left <= min(self.terms.tail, self.window) or full

    def _chunk(self, kv_tokens: int) -> Chunk:
        end = min(kv_tokens, self.sent + self.window)
        last = self.state is SourceState.COPYING and end == kv_tokens
        chunk = Chunk(self.move, self.sent, end, last)
        self.sent = end
        return chunk

    def _hand(self, now: float, kv_tokens: int) -> Handover:
        handover = Handover(self.move, self.sent, kv_tokens, self.snapshot())
        self.state, self._said, self._handover = SourceState.HANDED, now, handover
        return handover
