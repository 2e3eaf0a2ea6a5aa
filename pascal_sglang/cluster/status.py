"""What an instance tells the controller about itself: a few numbers, as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import orjson

VERSION = 2

# Where the controller listens; inherited by the schedulers, which it starts.
MONITOR_ENV = "PASCAL_SGLANG_MONITOR"
MAX_BYTES = 4096


class BadStatus(ValueError):
    """A message that is not a status; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One instance now. Names and meaning of the figures: `policy.placement.Instance`.

    received: requests it has taken in since it started, so that the controller knows which of its
    dispatches are counted here already.
    """

    dp_rank: int
    received: int
    on_pace: bool
    footprint: int
    thinking: int
    fresh: int
    free: int
    waiting: int
    capacity: int
    running: int
    pass_us: int
    prefill_ns: int

    def pack(self) -> bytes:
        return orjson.dumps({"version": VERSION, **dataclasses.asdict(self)})


_FIELDS = {
    field.name: bool if field.type == "bool" else int for field in dataclasses.fields(Status)
}


def unpack(message: bytes, instances: int) -> Status:
    """The status in `message`, of one of `instances`. Raises: `BadStatus`."""
    if len(message) > MAX_BYTES:
        raise BadStatus(f"{len(message)} bytes")
    try:
        values = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise BadStatus("not JSON") from error
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise BadStatus("another version")
    if values.keys() != _FIELDS.keys():
        raise BadStatus("unknown or missing fields")
    for name, kind in _FIELDS.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            raise BadStatus(f"{name} is {values[name]!r}")
    if values["dp_rank"] >= instances:
        raise BadStatus(f"no instance {values['dp_rank']}")
    return Status(**values)
