"""The target's side of a migration: a place in memory until the source hands the request over.

| state | holds | on | goes to |
|---|---|---|---|
| RECEIVING | reserved memory, KV as it comes | Handover, with all KV | OWNED: says CommitAck |
| OWNED | the request | Handover | OWNED: says CommitAck again |
| OWNED | the request | MigrationCancelled | REVOKED: drops the request |
| DROPPED, REVOKED | nothing | KVChunk, Handover, MigrationCancelled | says ReserveRefused |

MigrationCancelled, a time-out, an abort, a state that cannot be continued, or the source's death
lead from RECEIVING to DROPPED. A MigrationCancelled after the Handover says that the source waited
in vain for CommitAck, and has ended the request: this instance was stopped meanwhile. Otherwise
neither OWNED nor DROPPED is ever left, so that a repeated Handover is always told the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from pascal_sglang.cluster.messages import (
    ChunkAck,
    CommitAck,
    Handover,
    KVChunk,
    Message,
    MigrationCancelled,
    ReserveRefused,
)
from pascal_sglang.cluster.migration_source import Terms


class TargetState(Enum):
    RECEIVING = "receiving"
    OWNED = "owned"
    REVOKED = "revoked"
    DROPPED = "dropped"


@dataclass(slots=True, kw_only=True, eq=False)
class MigrationTarget(ABC):
    """One migration. What it returns has to be sent to the source, in order.

    The engine extends it with what the decisions do to memory and to the request.
    """

    migration: str
    rid: str
    terms: Terms
    # KV entries reserved.
    tokens: int
    # Leading tokens without entries of sliding windows: at first those for which none are
    # reserved, then those that the source has left out.
    before: int = 0
    state: TargetState = TargetState.RECEIVING
    why: str = ""
    upto: int = 0
    # The source has been told that so much is in place.
    acked: int = 0
    heard: float = 0.0
    # Ends of the pieces that are being read, oldest first.
    _reading: deque[int] = field(default_factory=deque)

    @abstractmethod
    def fetch(self, begin: int, end: int, before: int, *, stopped: bool) -> bool:
        """Begin to take KV of the tokens `begin`..`end` out of the slot, the first `before` of the
        request's without entries of sliding windows; whether that worked. A piece is in the next
        window; stopped: it is the last one, which begins where the slot does, and what a request
        has besides KV is there too."""

    @abstractmethod
    def has_read(self) -> bool | None:
        """Whether the oldest piece fetched is in place, and its window free; None while it is being
        read, False if that failed. Asked again for the next one once it is."""

    @abstractmethod
    def problem(self, state: bytes, tokens: int) -> str | None:
        """What is wrong with the state of a request; None if it can be continued here."""

    @abstractmethod
    def take(self, state: bytes, tokens: int) -> bool:
        """Everything is here and the request is ours; `before` says what the windows lack. False
        if that failed: then nothing is left of it here."""

    @abstractmethod
    def drop(self) -> None:
        """Give the reserved memory back."""

    @abstractmethod
    def revoke(self) -> None:
        """End the request that was ours, without a word."""

    def hear(self, message: Message, now: float) -> list[Message]:
        """Take in the source's message, whatever its order."""
        if isinstance(message, MigrationCancelled):
            self._cancelled()
            return [ReserveRefused(self.migration, self.why)]
        if self.state is TargetState.OWNED:
            return [CommitAck(self.migration)] if isinstance(message, Handover) else []
        if isinstance(message, KVChunk):
            return self._chunk(message, now)
        if isinstance(message, Handover):
            return self._handover(message, now)
        return []

    def tick(self, now: float) -> list[Message]:
        """Once per pass: say what is in place; give up waiting."""
        said = self._acks()
        if self.state is TargetState.RECEIVING and now - self.heard > self.terms.patience_s:
            return self.give_up("timeout")
        return said

    def _acks(self) -> list[Message]:
        before = self.acked
        while self.state is TargetState.RECEIVING and self._reading:
            read = self.has_read()
            if read is None:
                break
            if not read:
                return self.give_up("transport")
            self.acked = self._reading.popleft()
        return [ChunkAck(self.migration, self.acked)] if self.acked > before else []

    def give_up(self, why: str) -> list[Message]:
        """What has come so far is dropped; nothing happens to a request that is ours."""
        if self.state is not TargetState.RECEIVING:
            return []
        self.state, self.why = TargetState.DROPPED, why
        self.drop()
        return [ReserveRefused(self.migration, why)]

    def _cancelled(self) -> None:
        if self.state is TargetState.OWNED:
            self.state, self.why = TargetState.REVOKED, "cancelled"
            self.revoke()
        self.give_up("cancelled")

    def _chunk(self, chunk: KVChunk, now: float) -> list[Message]:
        if self.state is not TargetState.RECEIVING:
            return [ReserveRefused(self.migration, self.why)]
        self.heard = now
        # Only the next piece is taken. An earlier one said again has been, and its window may hold
        # another one by now; of a later one, the one before is lost.
        if chunk.begin != self.upto:
            return [ChunkAck(self.migration, self.acked)]
        if chunk.before < self.before:
            return self.give_up("a hole in the KV")
        if not self._fetched(chunk.begin, chunk.end, chunk.before, stopped=False):
            return self.give_up("transport")
        self._reading.append(chunk.end)
        return self._acks()

    def _handover(self, handover: Handover, now: float) -> list[Message]:
        if self.state is not TargetState.RECEIVING:
            return [ReserveRefused(self.migration, self.why)]
        self.heard = now
        # A window only slides on: what earlier pieces left out, a later one cannot see.
        slid = self.before <= handover.before <= handover.kv_tokens
        if handover.begin != self.upto or not slid:
            return self.give_up("a hole in the KV")
        if handover.kv_tokens > self.tokens:
            return self.give_up("outgrew its reservation")
        problem = self.problem(handover.state, handover.kv_tokens)
        if problem is not None:
            return self.give_up(problem)
        begin, end = handover.begin, handover.kv_tokens
        if not self._fetched(begin, end, handover.before, stopped=True):
            return self.give_up("transport")
        if not self.take(handover.state, handover.kv_tokens):
            self.state, self.why = TargetState.DROPPED, "failed"
            return [ReserveRefused(self.migration, self.why)]
        self.state = TargetState.OWNED
        return [CommitAck(self.migration)]

    def _fetched(self, begin: int, end: int, before: int, *, stopped: bool) -> bool:
        within = begin <= end <= self.tokens and before <= self.tokens
        if not within or not self.fetch(begin, end, before, stopped=stopped):
            return False
        self.upto, self.before = end, before
        return True
