"""What two schedulers say to each other about one migration, and each to the controller.

`migration` names the migration, not the request: a request that stays after a failed one and moves
later does so under a new name, and whatever is late from the first is recognised by it.

KV itself never goes this way. It goes through the target's slot of the receive buffer
(`cluster.transport`), piece by piece: one is written into a window of the slot only once the target
has said that it took what was there before.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pascal_sglang.policy.prefix_namespace import Namespace

# Characters of a text, and members of a list.
MAX_TEXT = 1024
MAX_ITEMS = 4096
# Reasons for which requests stay, of which a drain tells, and characters of one.
MAX_REASONS = 32
MAX_REASON = 128
# A request's state holds its prompt and answer: five bytes per token at most.
MAX_STATE_BYTES = 32 * 1024 * 1024
# Of a token that travels by itself.
TOKEN_BYTES = 8

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Reason = Annotated[str, Meta(max_length=MAX_REASON)]
Texts = Annotated[list[Text], Meta(max_length=MAX_ITEMS)]
Counts = Annotated[list[Count], Meta(max_length=MAX_ITEMS)]
State = Annotated[bytes, Meta(max_length=MAX_STATE_BYTES)]


class ControlMessage(
    msgspec.Struct, frozen=True, tag=True, tag_field="kind", forbid_unknown_fields=True
):
    """Every field of a message has to be in its bytes, and nothing else: no field has a default."""


class Message(ControlMessage, frozen=True):
    """About one migration, between its two sides."""

    migration: Text


class ReceiveBuffers(ControlMessage, frozen=True):
    """Instance to every other instance, once, at its start: the addresses of its receive buffers,
    one per TP rank. Opening and pinning a receive buffer takes time that no request should wait
    for."""

    receive_buffers: Texts


class ReserveRequest(Message, frozen=True):
    """Source to target: may a request come that will hold `tokens` KV entries at most when it
    does? No sliding window sees the first `before` of them any more. `layout` names the format of
    a KV entry; both sides have to have the same."""

    rid: Text
    tokens: Count
    before: Count
    layout: Text


class ReserveGranted(Message, frozen=True):
    """Target to source: memory is reserved, and so is a slot, whose windows take `slot_tokens` KV
    entries each. It begins at byte `offset` of the receive buffers at the addresses
    `receive_buffers`, one per TP rank."""

    receive_buffers: Texts
    offset: Count
    slot_tokens: Count


class ReserveRefused(Message, frozen=True):
    """Target to source: it cannot come, or no longer."""

    why: Text


class KVChunk(Message, frozen=True):
    """Source to target: KV of the tokens `begin`..`end` is in the slot's next window; behind it,
    for a model with sliding windows, that of its layers with windows, without the request's first
    `before` tokens. last: there is no more yet, and the request stops once the target has this."""

    begin: Count
    end: Count
    before: Count
    last: bool


class ChunkAck(Message, frozen=True):
    """Target to source: KV up to token `upto` is in place; the windows it was in are free again."""

    upto: Count


class Handover(Message, frozen=True):
    """Source to target: it is yours. The request stopped at `kv_tokens`; their KV from `begin` on
    is at the slot's beginning as in a `KVChunk`, behind it the recurrent state of a model that has
    them, and `state` is all else that it needs. Repeated until answered."""

    begin: Count
    kv_tokens: Count
    before: Count
    state: State


class CommitAck(Message, frozen=True):
    """Target to source: it has taken over; the source may forget the request."""


class MigrationCancelled(Message, frozen=True):
    """Source to target: it writes into the slot no more, and the request is not the target's:
    drop it, or what has come of it. Answered by Refused."""


class WriteQuery(Message, frozen=True):
    """Target to source: for the target the move is over; may the source still write into its
    slot? Repeated until answered by Cancelled."""


class ReasoningEnded(ControlMessage, frozen=True):
    """Instance to controller: the request has just ended its reasoning.

    remaining: the most answering tokens that it can still produce. likely: how many it probably
    will. passes: scheduling passes that moving it takes, and so tokens that it answers meanwhile.
    """

    dp_rank: Count
    rid: Text
    kv_tokens: Count
    remaining: Count
    likely: Count
    passes: Count


class MigrateCommand(ControlMessage, frozen=True):
    """Controller to instance: move the request to the instance `target`."""

    migration: Text
    rid: Text
    target: Count


class DrainCommand(MigrateCommand, frozen=True):
    """Controller to instance, which is being drained: move the request in whatever state it is, one
    that waits too. without_kv: it is prefilled again on `target`, which had no memory for it."""

    without_kv: bool


class MigrationEnded(ControlMessage, frozen=True):
    """Either instance to controller: a move has ended. `done`: the request is the target's;
    otherwise `why` it stays."""

    dp_rank: Count
    migration: Text
    done: bool
    why: Text


class RequestFinished(ControlMessage, frozen=True):
    """Instance to controller: the request has ended there. `blocks` name its whole text
    (`cluster.prefix_index`), which the instance holds for the next turn."""

    dp_rank: Count
    rid: Text
    blocks: Counts


class TurnElsewhere(ControlMessage, frozen=True):
    """Controller to instance: a request went to another one, though this one has most of its
    prompt. `ids` are its tokens, of `TOKEN_BYTES` each. What the instance keeps for it is of no
    use any more."""

    ids: State
    extra_key: Text | None
    cache_salt: Text | None

    def prompt(self) -> tuple[array[int], Namespace]:
        """The tokens, and inside of what their KV is shared."""
        ids = array("q")
        ids.frombytes(self.ids)
        return ids, Namespace(self.extra_key, self.cache_salt)


class LocationQuery(ControlMessage, frozen=True):
    """Controller to instances: which of these requests live there? `number` names the question."""

    number: Count
    rids: Texts


class LocationReply(ControlMessage, frozen=True):
    """Instance to controller: these of the requests asked about live there. received: requests that
    the instance had taken in by then (`LoadReport.received`)."""

    dp_rank: Count
    number: Count
    received: Count
    rids: Texts


class InstanceDown(ControlMessage, frozen=True):
    """Controller to instances: the instance is no more."""

    dp_rank: Count


class DrainRequest(ControlMessage, frozen=True):
    """HTTP process to controller: drain the instance, or let it take requests again. `number` names
    the question."""

    number: Count
    dp_rank: Count
    drain: bool


class DrainProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an instance is drained; requests unless said otherwise."""

    # `serving`, `draining`, or `drained`: no request is left.
    state: Text
    # On the instance now, and of these on their way to another one.
    left: Count
    moving: Count
    # That have gone on elsewhere since the drain began.
    moved: Count
    # That are left and did not move when they were told to, by reason.
    kept: Annotated[dict[Reason, Count], Meta(max_length=MAX_REASONS)]
    # Since the drain began.
    seconds: Annotated[float, Meta(ge=0)]

    def describe(self) -> dict[str, Any]:
        """For the reply, and for `GET /pascal/status`."""
        return msgspec.structs.asdict(self)


class DrainReply(ControlMessage, frozen=True):
    """Controller to HTTP process. problem: why nothing was done; empty if it was."""

    number: Count
    problem: Text
    progress: DrainProgress


class Terminating(ControlMessage, frozen=True):
    """Instance to controller: one of its processes was told to end, and asks to be drained first.
    rank: the process, by its TP rank; one that was told twice ends at once."""

    dp_rank: Count
    rank: Count


class MayEnd(ControlMessage, frozen=True):
    """Controller to instance, which was told to end: no request is left on it. problem: why it is
    not drained until then; empty if it was."""

    problem: Text


class ControlAnswered(ControlMessage, frozen=True):
    """Instance to controller: it has answered a control request, whose type has that name."""

    dp_rank: Count
    request: Text


class LoadReport(ControlMessage, frozen=True, kw_only=True):
    """Instance to controller: its load now."""

    dp_rank: Count
    # Requests it has taken in since it started, so that the controller knows which of its
    # dispatches are counted here already.
    received: Count
    # The rest: see `policy.placement.LoadFigures`.
    on_pace: bool
    footprint: Count
    reasoning: Count
    fresh: Count
    free: Count
    fits: Count
    waiting: Count
    capacity: Count
    load: Count
    pass_us: Count
    batch: Count
    prefill_ns: Count


AnyMessage = (
    ReceiveBuffers
    | ReserveRequest
    | ReserveGranted
    | ReserveRefused
    | KVChunk
    | ChunkAck
    | Handover
    | CommitAck
    | MigrationCancelled
    | WriteQuery
    | ReasoningEnded
    | MigrateCommand
    | DrainCommand
    | MigrationEnded
    | RequestFinished
    | TurnElsewhere
    | InstanceDown
    | LocationQuery
    | LocationReply
    | DrainRequest
    | DrainReply
    | Terminating
    | MayEnd
    | ControlAnswered
    | LoadReport
)
