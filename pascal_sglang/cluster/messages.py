"""What two schedulers say to each other about one migration, and each to the controller.

`migration` names the migration, not the request: a request that stays after a failed one and moves
later does so under a new name, and whatever is late from the first is recognised by it.

KV itself never goes this way. It goes through the target's slot of the receive buffer
(`cluster.transport`), one piece at a time: the next one is written only once the target has said
that it took the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pascal_sglang.policy.placement import LoadFigures


@dataclass(frozen=True, slots=True)
class Message:
    migration: str


@dataclass(frozen=True, slots=True)
class ReceiveBuffers:
    """Instance to every other instance, once, at its start: the addresses of its receive buffers,
    one per TP rank. Opening and pinning a receive buffer takes time that no request should wait
    for."""

    receive_buffers: list[str]


@dataclass(frozen=True, slots=True)
class ReserveRequest(Message):
    """Source to target: may a request come that will hold `tokens` KV entries at most when it
    does? `layout` names the format of a KV entry; both sides have to have the same."""

    rid: str
    tokens: int
    layout: str


@dataclass(frozen=True, slots=True)
class ReserveGranted(Message):
    """Target to source: memory is reserved, and so is a slot of `slot_tokens` KV entries. It begins
    at byte `offset` of the receive buffers at the addresses `receive_buffers`, one per TP rank."""

    receive_buffers: list[str]
    offset: int
    slot_tokens: int


@dataclass(frozen=True, slots=True)
class ReserveRefused(Message):
    """Target to source: it cannot come, or no longer."""

    why: str


@dataclass(frozen=True, slots=True)
class KVChunk(Message):
    """Source to target: KV of the tokens `begin`..`end` is in the slot. last: there is no more
    yet, and the request stops once the target has this."""

    begin: int
    end: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class ChunkAck(Message):
    """Target to source: KV up to token `upto` is in place; the slot is free again."""

    upto: int


@dataclass(frozen=True, slots=True)
class Handover(Message):
    """Source to target: it is yours. The request stopped at `kv_tokens`; their KV from `begin` on
    is in the slot, and `state` is all else that it needs. Repeated until answered."""

    begin: int
    kv_tokens: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CommitAck(Message):
    """Target to source: it has taken over; the source may forget the request."""


@dataclass(frozen=True, slots=True)
class MigrationCancelled(Message):
    """Source to target: it writes into the slot no more, and the request is not the target's:
    drop it, or what has come of it. Answered by Refused."""


@dataclass(frozen=True, slots=True)
class WriteQuery(Message):
    """Target to source: for the target the move is over; may the source still write into its
    slot? Repeated until answered by Cancelled."""


@dataclass(frozen=True, slots=True)
class ReasoningEnded:
    """Instance to controller: the request has just ended its reasoning.

    remaining: the most answering tokens that it can still produce. likely: how many it probably
    will. passes: scheduling passes that moving it takes, and so tokens that it answers meanwhile.
    """

    dp_rank: int
    rid: str
    kv_tokens: int
    remaining: int
    likely: int
    passes: int


@dataclass(frozen=True, slots=True)
class MigrateCommand:
    """Controller to instance: move the request to the instance `target`."""

    migration: str
    rid: str
    target: int


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """Either instance to controller: a move has ended. `done`: the request is the target's;
    otherwise `why` it stays."""

    dp_rank: int
    migration: str
    done: bool
    why: str


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """Instance to controller: the request has ended there. `blocks` name its whole text
    (`cluster.prefix_index`), which the instance holds for the next turn."""

    dp_rank: int
    rid: str
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class LocationQuery:
    """Controller to instances: which of these requests live there? `number` names the question."""

    number: int
    rids: list[str]


@dataclass(frozen=True, slots=True)
class LocationReply:
    """Instance to controller: these of the requests asked about live there. received: requests that
    the instance had taken in by then (`LoadReport.received`)."""

    dp_rank: int
    number: int
    received: int
    rids: list[str]


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """Controller to instances: the instance is no more."""

    dp_rank: int


@dataclass(frozen=True, slots=True)
class ControlAnswered:
    """Instance to controller: it has answered a control request, whose type has that name."""

    dp_rank: int
    request: str


@dataclass(slots=True, kw_only=True)
class LoadReport(LoadFigures):
    """Instance to controller: its load now."""

    dp_rank: int
    # Requests it has taken in since it started, so that the controller knows which of its
    # dispatches are counted here already.
    received: int
