"""The source's side of a move: owner of the request until it says `Yours`.

| state | the request | on | goes to |
|---|---|---|---|
| ASKING | decodes here | Granted | COPYING, or HANDING for stop-and-copy |
| COPYING | decodes here, KV follows in chunks | little is left to copy | HANDING |
| HANDING | paused here | Ready | GIVEN: says Yours, frees its KV |
| GIVEN | the target's | Mine | gone |
| KEPT | goes on here | Ready | KEPT: says Cancelled again |

Refused, a time-out, the end or abort of the request, or the target's death lead from the first
three to KEPT. The step to GIVEN is the one decision of a move, and only the source takes it; it is
never taken back. A target that does not hear of it asks again (Ready) and is told the same.
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
    Ready,
    Refused,
    Yours,
)


class SourceState(Enum):
    ASKING = "asking"
    COPYING = "copying"
    HANDING = "handing"
    GIVEN = "given"
    KEPT = "kept"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How moves are made. Times in seconds, lengths in tokens.

    live: copy while decoding; otherwise pause first. chunk: tokens per message. tail: copy what is
    left while paused once it is this little. patience_s: without news before `Yours` the request
    stays. repeat_s: between repetitions of what must be answered.
    """

    live: bool = True
    chunk: int = 512
    tail: int = 16
    patience_s: float = 2.0
    repeat_s: float = 0.25


@dataclass(slots=True)
class Source:
    """One move. What it returns has to be sent to the target, in order.

    pause, snapshot: called once, when the request has to stop; `pause` returns its KV tokens then.
    resume: it stays after a pause. release: it is the target's now.
    """

    move: str
    rid: str
    terms: Terms
    pause: Callable[[], int]
    snapshot: Callable[[], dict[str, Any]]
    resume: Callable[[], None]
    release: Callable[[], None]
    state: SourceState = SourceState.ASKING
    why: str = ""
    sent: int = 0
    acked: int = 0
    heard: float = 0.0
    _said: float = 0.0
    _handover: Handover | None = field(default=None)

    def begin(self, now: float, kv_tokens: int, reserve: int) -> list[Message]:
        self.heard = now
        return [Ask(self.move, self.rid, kv_tokens, reserve)]

    def hear(self, message: Message, now: float) -> list[Message]:
        """Take in the target's message; one that does not fit the state is answered by the state
        or ignored."""
        if isinstance(message, Ready):
            return self._ready(now)
        if isinstance(message, Mine):
            if self.state is SourceState.GIVEN:
                self.state = SourceState.DONE
            return []
        if self.state not in OPEN:
            return []
        self.heard = now
        if isinstance(message, Refused):
            return self.keep(message.why)
        if isinstance(message, Granted) and self.state is SourceState.ASKING:
            self.state = SourceState.COPYING
            return [] if self.terms.live else self._hand(now)
        if isinstance(message, Got):
            self.acked = max(self.acked, message.upto)
        return []

    def copy(self, now: float, kv_tokens: int) -> list[Message]:
        """Once per pass: the request holds `kv_tokens`; send what is new, pause when little is."""
        if self.state is not SourceState.COPYING:
            return []
        # One chunk in flight at a time: what is copied must not outrun what arrives.
        if self.acked < self.sent:
            return []
        if kv_tokens - self.sent <= self.terms.tail:
            return self._hand(now)
        return [self._chunk(min(kv_tokens, self.sent + self.terms.chunk))]

    def tick(self, now: float) -> list[Message]:
        """Time has passed: give up waiting, or say again what must be answered."""
        if self.state in OPEN and now - self.heard > self.terms.patience_s:
            return self.keep("timeout")
        if self.state is SourceState.GIVEN and now - self._said >= self.terms.repeat_s:
            self._said = now
            return [Yours(self.move)]
        return []

    def keep(self, why: str) -> list[Message]:
        """The request stays, or has ended here; nothing happens if it is the target's already."""
        if self.state not in OPEN:
            return []
        paused = self.state is SourceState.HANDING
        self.state, self.why = SourceState.KEPT, why
        if paused:
            self.resume()
        return [Cancelled(self.move)]

    def _ready(self, now: float) -> list[Message]:
        if self.state is SourceState.HANDING:
            self.state = SourceState.GIVEN
            self.release()
        if self.state in (SourceState.GIVEN, SourceState.DONE):
            self._said = now
            return [Yours(self.move)]
        return [Cancelled(self.move)] if self.state is SourceState.KEPT else []

    def _hand(self, now: float) -> list[Message]:
        kv_tokens = self.pause()
        self.state, self.heard = SourceState.HANDING, now
        out: list[Message] = []
        while self.sent < kv_tokens:
            out.append(self._chunk(min(kv_tokens, self.sent + self.terms.chunk)))
        self._handover = Handover(self.move, kv_tokens, self.snapshot())
        return [*out, self._handover]

    def _chunk(self, end: int) -> Chunk:
        chunk = Chunk(self.move, self.sent, end)
        self.sent = end
        return chunk


OPEN = frozenset({SourceState.ASKING, SourceState.COPYING, SourceState.HANDING})
