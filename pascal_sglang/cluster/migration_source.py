"""The source's side of a migration: owner of the request until it hands it over.

| state | the request | on | goes to |
|---|---|---|---|
| ASKING | decodes here | ReserveGranted | COPYING |
| COPYING | decodes here, KV follows | little is left, or stop-and-copy | STOPPING |
| COPYING | has filled what was reserved | a piece or less is left | STOPPING |
| COPYING | | more is left | KEPT |
| STOPPING | leaves the batch; the rest is copied | it stands still, one slot is left | HANDED |
| HANDED | the target's, unless it refuses; KV kept | CommitAck | DONE: frees its KV |
| REVOKING | has ended with an error | ReserveRefused | LOST |
| KEPT | goes on here | | |

ReserveRefused, a time-out, the end or abort of the request, or the target's death lead from the
first three to KEPT. The target's slot has `WINDOWS` windows, which pieces take in turn, so that one
is written while another is read. The Handover comes when all of them are free, and may use the
whole slot. It is the one decision of a migration, made once all KV is in the slot. After it
the source waits for the target's word, CommitAck or ReserveRefused, and says it again: silence may
mean that the target decodes already. ReserveRefused leads to KEPT; the target's death ends the
request (LOST).

A target that does not answer `Terms.handovers` times, which takes ten seconds, is stopped. It may
have taken over before, so the source must not go on. The request ends with an error, and the source
says MigrationCancelled until the target has heard that it must not go on either (REVOKING). No
token can come twice: the source produces none after a Handover that was not refused, and what the
target produces until it hears belongs to a request that has ended. The limit counts Handovers, not
seconds: a source that was stopped itself hears what has come meanwhile before it says the next one.
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
# Pieces in flight at a time.
WINDOWS = 2


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
    # KV entries of the reserve that are left for tokens which arrive while it stops.
    spare: int = 2
    sent: int = 0
    # KV entries that a window takes, and what a piece has at most by what the link carries in a
    # step, if that is known.
    slot_tokens: int = 0
    link_tokens: int | None = None
    # A network carries the Handover too: it has no more than a piece then, else what a slot takes.
    over_network: bool = False
    # Passes since the target granted it, and pieces written in them; until it stops.
    passes: int = 0
    pieces: int = 0
    # What is being written; the target is told of it by `written`.
    writing: KVChunk | Handover | None = None
    heard: float = 0.0
    # Of each piece in flight, oldest first: its end, and `passes` when it was begun.
    _in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    # The most passes between the beginning of a piece and the target's word that it is read.
    _piece_passes: int = 0
    _said: float = 0.0
    _times: int = 0
    _handover: Handover | None = field(default=None)

    @abstractmethod
    def stop(self) -> None:
        """The request has to leave the batch. Called once."""

    @abstractmethod
    def learn(self) -> None:
        """Copying beside the decoding is over: `pieces` have been begun in `passes`."""

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
            while self._in_flight and self._in_flight[0][0] <= message.upto:
                _, begun = self._in_flight.popleft()
                self._piece_passes = max(self._piece_passes, self.passes + 1 - begun)
        return []

    def copy(
        self, kv_tokens: int, *, still: bool, before: int = 0, room: bool = True
    ) -> list[Message]:
        """Once per pass: the request holds `kv_tokens`, the first `before` of which no sliding
        window sees any more, and `still` says that it has stopped and will hold no more. What is
        returned has to be written into the slot first: `written` sends it. room: something can be
        written now. The request is stopped when little is left and there is room. When its reserve
        is full it stays if more is left than a piece takes, and is stopped otherwise, whatever is
        in flight."""
        if self.state not in (SourceState.COPYING, SourceState.STOPPING):
            return []
        left = kv_tokens - self.sent
        if self.state is SourceState.COPYING:
            self.passes += 1
            is_full = kv_tokens + self.spare >= self.reserve
            if is_full and self.terms.live and left > self.piece_tokens:
                self.learn()
                return self.keep("outgrew its reservation")
            is_little = not self.terms.live or left <= self.tail
            if is_full or (is_little and room and not self._in_flight):
                if self.terms.live:
                    self.learn()
                self.state = SourceState.STOPPING
                self.stop()
                return []
            if left <= self.tail:
                return []
        if self.state is SourceState.STOPPING:
            if not still or not room or isinstance(self.writing, Handover):
                return []
            if left <= (self.piece_tokens if self.over_network else self.slot_tokens):
                return [] if self._in_flight else [self._hand(kv_tokens, before)]
        if self.writing is not None or len(self._in_flight) == WINDOWS or not room:
            return []
        return [self._chunk(kv_tokens, before)]

    @property
    def piece_tokens(self) -> int:
        """KV entries that a piece has at most: what the link carries in a step, if that is
        known."""
        if self.link_tokens is None:
            return self.slot_tokens
        return min(self.slot_tokens, self.link_tokens)

    @property
    def tail(self) -> int:
        """Stop once this little is left: it is written while the reader waits."""
        # More than what it gains while the last piece goes, or it never stops: the next one would
        # be due before the target, whose passes may be longer, has said that it has read this one.
        # `spare` is what it gains in two passes.
        gained = min((self._piece_passes + 1) * self.spare // 2, self.piece_tokens)
        return min(max(self.terms.tail, 4 * self.spare, gained), self.slot_tokens)

    def written(self, now: float) -> list[Message]:
        """What was being written is in the slot."""
        message, self.writing = self.writing, None
        if message is None or self.state not in OPEN:
            return []
        if isinstance(message, Handover):
            self.state, self._handover = SourceState.HANDED, message
            self._say_again(now)
        return [message]

    def unsent(self, why: str) -> list[Message]:
        """What `copy` has returned could not be put into the slot: the request stays."""
        self.writing = None
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

    def _chunk(self, kv_tokens: int, before: int) -> KVChunk:
        end = min(kv_tokens, self.sent + self.piece_tokens)
        last = self.state is SourceState.COPYING and end == kv_tokens
        self.writing = KVChunk(self.migration, self.sent, end, before, last)
        self.sent = end
        self.pieces += 1
        self._in_flight.append((end, self.passes))
        return self.writing

    def _hand(self, kv_tokens: int, before: int) -> Handover:
        self.writing = Handover(self.migration, self.sent, kv_tokens, before, self.snapshot())
        return self.writing
