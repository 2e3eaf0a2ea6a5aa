"""Control messages as bytes: MessagePack, a tagged struct in an envelope with version and sender.

Nothing is unpickled. What is not exactly a known message is a `BadMessage`, to be counted and
dropped by whoever listens.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any

import msgspec

from pascal_sglang.cluster.messages import (
    MAX_ITEMS,
    MAX_STATE_BYTES,
    MAX_TEXT,
    TOKEN_BYTES,
    AnyMessage,
    ControlMessage,
    Count,
    Handover,
    TurnElsewhere,
)

# Goes up with every change to what a message says; a change of its fields is rejected anyway.
VERSION = 5
# The rest of a Handover is a few numbers and a name; a TurnElsewhere is bounded alike.
MAX_HANDOVER_BYTES = MAX_STATE_BYTES + 64 * 1024
LONG = (Handover, TurnElsewhere)
# Of any other message: each of a text's characters takes four bytes at most, a block's name nine.
# The longest is a `RequestFinished` with `MAX_ITEMS` blocks.
MAX_BYTES = 9 * MAX_ITEMS + 8 * MAX_TEXT

# What decoding raises for bytes that are not of the type asked for.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

KINDS: dict[str, type[ControlMessage]] = {
    kind.__name__: kind for kind in typing.get_args(AnyMessage)
}


class BadMessage(ValueError):
    """Bytes that are no message of ours; the text says why, in a few words without their content,
    so that it can name a counter."""


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    sender: Count
    message: msgspec.Raw


class _Whole(_Envelope, forbid_unknown_fields=True):
    message: AnyMessage  # type: ignore[assignment]


class _Tag(msgspec.Struct):
    kind: str


_ENCODER = msgspec.msgpack.Encoder()
_ENVELOPE = msgspec.msgpack.Decoder(_Envelope)
_WHOLE = msgspec.msgpack.Decoder(_Whole)


def pack(message: ControlMessage, sender: int = 0) -> bytes:
    """`message` as bytes. sender: the instance that says it. Raises: ValueError for a text that is
    no valid Unicode, OverflowError for a number above 64 bits, TypeError for another value that
    MessagePack does not have."""
    return _ENCODER.encode({"version": VERSION, "sender": sender, "message": message})


def unpack(data: bytes, instances: int) -> tuple[int, Any]:
    """The sender and the message in `data`, among `instances`. Raises: `BadMessage`."""
    if len(data) > MAX_HANDOVER_BYTES:
        raise BadMessage("oversized")
    try:
        whole = _WHOLE.decode(data)
    except UNREADABLE as error:
        raise BadMessage(_problem_with(data, instances)) from error
    sender, message = whole.sender, whole.message
    if sender >= instances:
        raise BadMessage("no such sender")
    if len(data) > MAX_BYTES and not isinstance(message, LONG):
        raise BadMessage("oversized")
    if isinstance(message, TurnElsewhere) and len(message.ids) % TOKEN_BYTES:
        raise BadMessage("TurnElsewhere: malformed")
    if getattr(message, "dp_rank", 0) >= instances or getattr(message, "target", 0) >= instances:
        raise BadMessage(f"{type(message).__name__}: no such instance")
    return sender, message


def _problem_with(data: bytes, instances: int) -> str:
    """Why it is none of ours; msgspec's own words would repeat its content."""
    try:
        envelope = _ENVELOPE.decode(data)
    except msgspec.ValidationError:
        return "no envelope of this version"
    except UNREADABLE:
        return "not MessagePack"
    if envelope.sender >= instances:
        return "no such sender"
    try:
        kind = msgspec.msgpack.decode(envelope.message, type=_Tag).kind
    except UNREADABLE:
        return "unknown kind"
    return f"{kind}: malformed" if kind in KINDS else "unknown kind"
