"""What two schedulers say to each other about one move.

`move` names the move, not the request: a request that stays after a failed move and moves later
does so under a new name, and whatever is late from the first is recognised by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    move: str


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """Source to target: may a request that holds `kv_tokens` now, and grows, come? `tokens` is what
    to reserve."""

    rid: str
    kv_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Granted(Message):
    """Target to source: memory is reserved."""


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Target to source: it cannot come, or no longer."""

    why: str


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """Source to target: KV of the tokens `begin`..`end` is on the transport."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Got(Message):
    """Target to source: KV up to token `upto` has arrived whole."""

    upto: int


@dataclass(frozen=True, slots=True)
class Handover(Message):
    """Source to target: the request is paused at `kv_tokens`; `state` is all else it needs."""

    kv_tokens: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """Target to source: everything is here; whose is it? Repeated until answered."""


@dataclass(frozen=True, slots=True)
class Yours(Message):
    """Source to target: the source has let go. From here on the target alone emits tokens."""


@dataclass(frozen=True, slots=True)
class Mine(Message):
    """Target to source: it has taken over; the source may forget the move."""


@dataclass(frozen=True, slots=True)
class Cancelled(Message):
    """Source to target: the request stays; drop what has come."""
