"""What two schedulers say to each other about one move.

`move` names the move, not the request: a request that stays after a failed move and moves later
does so under a new name, and whatever is late from the first is recognised by it.

KV itself never goes this way. It goes through the target's landing window (`cluster.transport`),
one piece at a time: the next one is written only once the target has said that it took the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    move: str


@dataclass(frozen=True, slots=True)
class Landings:
    """Instance to every other instance, once, at its start: the addresses of its landings, one per
    TP rank. Opening and pinning a landing takes time that no request should wait for."""

    landings: list[str]


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """Source to target: may a request come that will hold `tokens` KV entries at most when it
    does? `layout` names the format of a KV entry; both sides have to have the same."""

    rid: str
    tokens: int
    layout: str


@dataclass(frozen=True, slots=True)
class Granted(Message):
    """Target to source: memory is reserved, and so is a landing window of `window` KV entries that
    begins at byte `offset` of the landings at the addresses `landings`, one per TP rank."""

    landings: list[str]
    offset: int
    window: int


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Target to source: it cannot come, or no longer."""

    why: str


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """Source to target: KV of the tokens `begin`..`end` is in the window. last: there is no more
    yet, and the request stops once the target has this."""

    begin: int
    end: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class Got(Message):
    """Target to source: KV up to token `upto` is in place; the window is free again."""

    upto: int


@dataclass(frozen=True, slots=True)
class Handover(Message):
    """Source to target: it is yours. The request stopped at `kv_tokens`; their KV from `begin` on
    is in the window, and `state` is all else that it needs. Repeated until answered."""

    begin: int
    kv_tokens: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mine(Message):
    """Target to source: it has taken over; the source may forget the request."""


@dataclass(frozen=True, slots=True)
class Cancelled(Message):
    """Source to target: it writes into the window no more, and the request is not the target's:
    drop it, or what has come of it. Answered by Refused."""


@dataclass(frozen=True, slots=True)
class WriteQuery(Message):
    """Target to source: for the target the move is over; may the source still write into its
    window? Repeated until answered by Cancelled."""
