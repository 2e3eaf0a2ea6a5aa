"""The source's side of a migration: owner of the request until it hands it over.

| state | the request | on | goes to |
|---|---|---|---|
| ASKING | decodes here | ReserveGranted | COPYING |
| COPYING | decodes here, KV follows | little is left, or stop-and-copy | STOPPING |
| STOPPING | leaves the batch; the rest is copied | it stands still, one slot is left | HANDED |
| HANDED | the target's, unless it refuses; KV kept | CommitAck | DONE: frees its KV |
| REVOKING | has ended with an error | ReserveRefused | LOST |
| KEPT | goes on here | | |

ReserveRefused, a time-out, the end or abort of the request, or the target's death lead from the
first three to KEPT. The Handover is the one decision of a migration. After it the source waits for
the target's word, CommitAck or ReserveRefused, and says it again: silence may mean that the target
decodes already. ReserveRefused leads to KEPT; the target's death ends the request (LOST).

A target that does not answer `Terms.handovers` times, which takes ten seconds, is stopped. It may
have taken over before, so the source must not go on. The request ends with an error, and the source
says MigrationCancelled until the target has heard that it must not go on either (REVOKING). No
token can come twice: the source produces none after a Handover that was not refused, and what the
target produces until it hears belongs to a request that has ended. The limit counts Handovers, not
seconds: a source that was stopped itself hears what has come meanwhile before it says the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from pascal_sglang.cluster.messages import (
    ChunkAck,
    CommitAck,
    Handover,
    KVChunk,
    Message,
    MigrationCancelled,
    ReserveGranted,
    ReserveRefused,
    ReserveRequest,
    WriteQuery,
)


class SourceState(Enum):
    ASKING = "asking"
    COPYING = "copying"
    STOPPING = "stopping"
    HANDED = "handed"
    REVOKING = "revoking"
    KEPT = "kept"
    LOST = "lost"
    DONE = "done"


OPEN = frozenset({SourceState.ASKING, SourceState.COPYING, SourceState.STOPPING})
OVER = frozenset({SourceState.KEPT, SourceState.LOST, SourceState.DONE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How moves are made. Times in seconds, lengths in tokens.

    live: copy while decoding; otherwise stop first. tail: stop once this little is left to copy.
    patience_s: without news before the Handover the request stays. repeat_s: until what must be
    answered is repeated for the first time; twice as long each time, up to repeat_at_most_s.
    handovers: Handovers without an answer before the request ends. cancellations: those after it,
    repeated like them up to revoke_at_most_s, before the source stops caring.
    """

    live: bool = True
    tail: int = 16
    patience_s: float = 2.0
    repeat_s: float = 0.25
    repeat_at_most_s: float = 2.0
    handovers: int = 7
    revoke_at_most_s: float = 60.0
    cancellations: int = 60


@dataclass(slots=True, kw_only=True, eq=False)
class MigrationSource(ABC):
    """One migration. What it returns has to be sent to the target, in order.

    The engine extends it with what the decisions do to the request.
    """

    migration: str
    rid: str
    terms: Terms
    # KV entries asked for; the request must not outgrow them.
    reserve: int
    state: SourceState = SourceState.ASKING
    why: str = ""
    sent: int = 0
    acked: int = 0
    slot_tokens: int = 0
    heard: float = 0.0
    _said: float = 0.0
    _times: int = 0
    _handover: Handover | None = field(default=None)

    @abstractmethod
    def stop(self) -> None:
        """The request has to leave the batch. Called once."""

    @abstractmethod
    def snapshot(self) -> bytes:
        """The state of the request, which stands still. Called once."""

    @abstractmethod
    def resume(self) -> None:
        """The request stays after a stop."""

    @abstractmethod
    def release(self) -> None:
        """The request is the target's now."""

    @abstractmethod
    def lose(self) -> None:
        """The request may be the target's, which has died or does not answer: it ends."""

    def begin(self, now: float, layout: str, before: int = 0) -> list[Message]:
        """Ask the target. before: leading tokens that no sliding window sees any more."""
        self.heard = now
        return [ReserveRequest(self.migration, self.rid, self.reserve, before, layout)]

    def hear(self, message: Message, now: float) -> list[Message]:
        """Take in the target's message; one that does not fit the state is ignored."""
        if isinstance(message, CommitAck):
            if self.state is SourceState.HANDED:
                self.state = SourceState.DONE
                self.release()
            return (
                [MigrationCancelled(self.migration)] if self.state is SourceState.REVOKING else []
            )
        if isinstance(message, ReserveRefused | WriteQuery):
            why = message.why if isinstance(message, ReserveRefused) else "over"
            return self._refused(why)
        if self.state not in OPEN:
            return []
        self.heard = now
        if isinstance(message, ReserveGranted) and self.state is SourceState.ASKING:
            self.state, self.slot_tokens = SourceState.COPYING, message.slot_tokens
        if isinstance(message, ChunkAck):
            self.acked = max(self.acked, message.upto)
        return []

    def copy(self, now: float, kv_tokens: int, *, still: bool, before: int = 0) -> list[Message]:
        """Once per pass: the request holds `kv_tokens`, the first `before` of which no sliding
        window sees any more, and `still` says that it has stopped and will hold no more. Send what
        is new; stop it when little is."""
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
        elif left <= self.slot_tokens:
            return [self._hand(now, kv_tokens, before)]
        return [self._chunk(kv_tokens, before)]

    def unsent(self, why: str) -> list[Message]:
        """What `copy` has just returned could not be put into the slot: the request stays."""
        if self.state is SourceState.HANDED:
            self._stay(why)
            return [MigrationCancelled(self.migration)]
        return self.keep(why)

    def tick(self, now: float) -> list[Message]:
        """Time has passed: give up waiting, or say again what must be answered."""
        if self.state in OPEN and now - self.heard > self.terms.patience_s:
            return self.keep("timeout")
        if self.state is SourceState.HANDED and self._is_due(now, self.terms.repeat_at_most_s):
            assert self._handover is not None
            if self._times < self.terms.handovers:
                self._say_again(now)
                return [self._handover]
            self.state, self.why = SourceState.REVOKING, "no answer"
            self._handover, self._times = None, 0
            self.lose()
        if self.state is SourceState.REVOKING and self._is_due(now, self.terms.revoke_at_most_s):
            if self._times < self.terms.cancellations:
                self._say_again(now)
                return [MigrationCancelled(self.migration)]
            self.state = SourceState.LOST
        return []

    def _is_due(self, now: float, at_most: float) -> bool:
        """Whether it is time to say again what was said last."""
        wait: float = self.terms.repeat_s * 2.0 ** min(max(0, self._times - 1), 10)
        return now - self._said >= min(wait, at_most)

    def _say_again(self, now: float) -> None:
        self._said = now
        self._times += 1

    def _refused(self, why: str) -> list[Message]:
        if self.state is SourceState.HANDED:
            self._stay(why)
            return [MigrationCancelled(self.migration)]
        if self.state is SourceState.REVOKING:
            self.state = SourceState.LOST
        return self.keep(why)

    def keep(self, why: str) -> list[Message]:
        """The request stays, or has ended here; nothing happens once it is handed over."""
        if self.state not in OPEN:
            return []
        self._stay(why)
        return [MigrationCancelled(self.migration)]

    def target_died(self) -> None:
        """Before the Handover the request stays. After it nobody knows which tokens its reader has
        seen: it ends."""
        if self.state is SourceState.HANDED:
            self.state, self.why = SourceState.LOST, "target died"
            self.lose()
        elif self.state is SourceState.REVOKING:
            self.state = SourceState.LOST
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
        return not self.terms.live or left <= min(self.terms.tail, self.slot_tokens) or full

    def _chunk(self, kv_tokens: int, before: int) -> KVChunk:
        end = min(kv_tokens, self.sent + self.slot_tokens)
        last = self.state is SourceState.COPYING and end == kv_tokens
        chunk = KVChunk(self.migration, self.sent, end, before, last)
        self.sent = end
        return chunk

    def _hand(self, now: float, kv_tokens: int, before: int) -> Handover:
        handover = Handover(self.migration, self.sent, kv_tokens, before, self.snapshot())
        self.state, self._handover = SourceState.HANDED, handover
        self._say_again(now)
        return handover
