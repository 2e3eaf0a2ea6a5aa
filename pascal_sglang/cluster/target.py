"""The target's side of a move: a place in memory until the source says `Yours`.

| state | holds | on | goes to |
|---|---|---|---|
| RECEIVING | reserved memory, KV as it comes | all KV and the state are here | READY: says Ready |
| READY | a complete request that is not its own | Yours | OWNED: says Mine, and decodes |
| OWNED | the request | Yours | OWNED: says Mine again |
| DROPPED | nothing | Chunk, Handover | DROPPED: says Refused |

Cancelled leads from the first two to DROPPED, and so does the source's death; a time-out only from
RECEIVING. In READY the target cannot know whose the request is, so it neither drops it nor runs it;
it asks (Ready) until it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pascal_sglang.cluster.messages import (
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
from pascal_sglang.cluster.source import Terms


class TargetState(Enum):
    RECEIVING = "receiving"
    READY = "ready"
    OWNED = "owned"
    DROPPED = "dropped"


@dataclass(slots=True)
class Target:
    """One move. What it returns has to be sent to the source, in order.

    take: everything is here and it is ours, once; `aborted` says that its abort came meanwhile.
    drop: give the reserved memory back. valid: whether a state can be continued here.
    """

    move: str
    rid: str
    terms: Terms
    take: Callable[[dict[str, Any], bool], None]
    drop: Callable[[], None]
    valid: Callable[[dict[str, Any]], str | None]
    state: TargetState = TargetState.RECEIVING
    why: str = ""
    upto: int = 0
    aborted: bool = False
    heard: float = 0.0
    _said: float = 0.0
    _handover: Handover | None = None

    def begin(self, now: float) -> list[Message]:
        """Memory is reserved."""
        self.heard = now
        return [Granted(self.move)]

    def hear(self, message: Message, now: float) -> list[Message]:
        """Take in the source's message, whatever its order."""
        if isinstance(message, Yours):
            return self._yours()
        if isinstance(message, Cancelled):
            self._drop("cancelled")
            return []
        if self.state is TargetState.DROPPED:
            return [Refused(self.move, self.why)]
        if self.state is not TargetState.RECEIVING:
            return []
        self.heard = now
        if isinstance(message, Handover):
            problem = self.valid(message.state)
            if problem is not None:
                self._drop(problem)
                return [Refused(self.move, problem)]
            self._handover = message
        return self._whole(now)

    def received(self, chunk: Chunk, now: float) -> list[Message]:
        """The KV of `chunk` is in place. Chunks arrive in order or not at all: one that does not
        join what is here is left for the source to notice."""
        if self.state is not TargetState.RECEIVING:
            return self.hear(chunk, now)
        self.heard = now
        if chunk.begin <= self.upto:
            self.upto = max(self.upto, chunk.end)
        return [Got(self.move, self.upto), *self._whole(now)]

    def tick(self, now: float) -> list[Message]:
        if self.state is TargetState.RECEIVING and now - self.heard > self.terms.patience_s:
            self._drop("timeout")
            return [Refused(self.move, "timeout")]
        if self.state is TargetState.READY and now - self._said >= self.terms.repeat_s:
            self._said = now
            return [Ready(self.move)]
        return []

    def abort(self) -> None:
        """The client gave the request up. The source hears it too, unless it has let go."""
        self.aborted = True

    def source_died(self) -> None:
        """Whatever the source had not let go of ended with it."""
        self._drop("source died")

    def _whole(self, now: float) -> list[Message]:
        if self._handover is None or self.upto < self._handover.kv_tokens:
            return []
        self.state, self._said = TargetState.READY, now
        return [Ready(self.move)]

    def _yours(self) -> list[Message]:
        if self.state is TargetState.READY:
            assert self._handover is not None
            self.state = TargetState.OWNED
            self.take(self._handover.state, self.aborted)
        return [Mine(self.move)] if self.state is TargetState.OWNED else []

    def _drop(self, why: str) -> None:
        if self.state in (TargetState.RECEIVING, TargetState.READY):
            self.state, self.why = TargetState.DROPPED, why
            self._handover = None
            self.drop()
