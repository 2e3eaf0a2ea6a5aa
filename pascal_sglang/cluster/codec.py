"""Control messages as bytes: JSON with a version and a kind, checked field by field on arrival.

Nothing is unpickled. What is not exactly a known message is a `BadMessage`, to be counted and
dropped by whoever listens.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import orjson

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.messages import LoadReport

VERSION = 2
# A request's state holds its prompt and answer: seven digits and a comma per token at most.
MAX_HANDOVER_BYTES = 32 * 1024 * 1024
# The rest of a Handover is a few numbers and a name.
MAX_STATE_BYTES = MAX_HANDOVER_BYTES - 64 * 1024
MAX_TEXT = 1024
MAX_ITEMS = 4096
# Of any other message: each of a text's characters takes six bytes at most, a block's name fifteen
# digits and a comma. The longest is a `RequestFinished` with `MAX_ITEMS` blocks.
MAX_BYTES = 16 * MAX_ITEMS + 12 * MAX_TEXT

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        messages.ReceiveBuffers,
        messages.ReserveRequest,
        messages.ReserveGranted,
        messages.ReserveRefused,
        messages.KVChunk,
        messages.ChunkAck,
        messages.Handover,
        messages.CommitAck,
        messages.MigrationCancelled,
        messages.WriteQuery,
        messages.ReasoningEnded,
        messages.MigrateCommand,
        messages.MigrationEnded,
        messages.RequestFinished,
        messages.InstanceDown,
        messages.LocationQuery,
        messages.LocationReply,
        messages.ControlAnswered,
        LoadReport,
    )
}
_TYPES = {name: typing.get_type_hints(kind) for name, kind in KINDS.items()}


class BadMessage(ValueError):
    """Bytes that are no message of ours; the text says why, in a few words without their content,
    so that it can name a counter."""


def pack(message: Any, sender: int = 0) -> bytes:
    """`message` as bytes. sender: the instance that says it."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    return orjson.dumps(
        {"version": VERSION, "kind": type(message).__name__, "sender": sender, **values},
        option=orjson.OPT_NON_STR_KEYS,
    )


def unpack(data: bytes, instances: int) -> tuple[int, Any]:
    """The sender and the message in `data`, among `instances`. Raises: `BadMessage`."""
    if len(data) > MAX_HANDOVER_BYTES:
        raise BadMessage("oversized")
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadMessage("not JSON") from error
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise BadMessage("another version")
    kind, sender = values.pop("kind", None), values.pop("sender", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadMessage("unknown kind")
    if kind != "Handover" and len(data) > MAX_BYTES:
        raise BadMessage("oversized")
    if type(sender) is not int or not 0 <= sender < instances:
        raise BadMessage("no such sender")
    types = _TYPES[kind]
    if values.keys() != types.keys():
        raise BadMessage(f"{kind}: unknown or missing fields")
    for name, expected in types.items():
        if not _fits(values[name], expected):
            raise BadMessage(f"{kind}: bad {name}")
    for name in ("dp_rank", "target"):
        if name in values and values[name] >= instances:
            raise BadMessage(f"{kind}: no such instance")
    return sender, KINDS[kind](**values)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a JSON value is one of the few types that our fields have; numbers are counts."""
    if expected is int:
        return type(value) is int and 0 <= value < 1 << 53
    if expected is bool:
        return type(value) is bool
    if expected is str:
        return type(value) is str and len(value) <= MAX_TEXT
    if typing.get_origin(expected) is list:
        (item,) = typing.get_args(expected)
        return (
            type(value) is list and len(value) <= MAX_ITEMS and all(_fits(v, item) for v in value)
        )
    return type(value) is dict
