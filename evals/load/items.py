"""One request of a workload, and the JSONL file a workload is kept in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.load.lines import WorkloadError, json_lines

HASH_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Item:
    """One request.

    arrival_s: seconds after the run starts; of a later turn the earliest possible time, because it
        is sent `pause_s` after its conversation's turn before it has ended.
    prompt_tokens: all that is sent, `history_tokens` of earlier turns and their answers included.
        Of a prompt given as text it is an estimate.
    thinking_tokens: tokens before the end-of-thinking marker, which is one more.
    answer_tokens: tokens after the marker.
    prompt: what this turn adds, as text or token ids; None draws ids.
    draw: seed and number of the drawn ids, so that they do not depend on the place in the list;
        None leaves them to the client.
    hash_ids: names of the blocks of `block_tokens` ids the prompt opens with; equal names are equal
        ids, so that prompts share prefixes.
    conversation, turn: which conversation it belongs to and its place there, from 0; None is a
        request by itself.
    """

    arrival_s: float
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    prompt: str | tuple[int, ...] | None = None
    draw: tuple[int, int] | None = None
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = HASH_BLOCK_TOKENS
    conversation: int | None = None
    turn: int = 0
    pause_s: float = 0.0
    history_tokens: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_s) and math.isfinite(self.pause_s)):
            raise ValueError("times must be finite")
        if min(self.arrival_s, self.pause_s, self.thinking_tokens, self.history_tokens) < 0:
            raise ValueError("times, thinking_tokens and history_tokens must not be negative")
        if self.answer_tokens < 1 or self.block_tokens < 1:
            raise ValueError("answer_tokens and block_tokens must be positive")
        if self.prompt_tokens <= self.history_tokens:
            raise ValueError("prompt_tokens must be more than history_tokens")
        if isinstance(self.prompt, tuple) and len(self.prompt) != self.new_tokens:
            raise ValueError("a prompt of ids must be as long as prompt_tokens says")
        if self.turn and self.conversation is None:
            raise ValueError("a later turn needs its conversation")

    @property
    def output_tokens(self) -> int:
        return self.thinking_tokens + 1 + self.answer_tokens

    @property
    def new_tokens(self) -> int:
        """Prompt tokens this turn adds to its conversation."""
        return self.prompt_tokens - self.history_tokens


_FIELDS = {field.name: field for field in dataclasses.fields(Item)}
# Types are text here, because annotations are not evaluated.
_REQUIRED = {name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING}
_INTEGERS = {name for name, field in _FIELDS.items() if field.type in ("int", "int | None")}
_NUMBERS = {name for name, field in _FIELDS.items() if field.type == "float"}
_ID_LISTS = {"prompt", "draw", "hash_ids"}


def save(items: Sequence[Item], path: Path) -> None:
    """One JSON object a line, without fields at their default; floats survive exactly."""
    with path.open("w") as file:
        for item in items:
            values = {
                name: getattr(item, name)
                for name, field in _FIELDS.items()
                if getattr(item, name) != field.default
            }
            file.write(json.dumps(values) + "\n")


def load(path: Path) -> list[Item]:
    """What `save` wrote; a bad file is a `WorkloadError` with its name and line."""
    items: list[Item] = []
    turns: dict[int, int] = {}
    is_text: dict[int, bool] = {}
    for where, values in json_lines(path):
        item = _item(values, where)
        if item.conversation is not None:
            expected = turns.get(item.conversation, 0)
            if item.turn != expected:
                raise WorkloadError(
                    f"{where}: turn {item.turn} of conversation {item.conversation}, not {expected}"
                )
            text = isinstance(item.prompt, str)
            if text != is_text.setdefault(item.conversation, text):
                raise WorkloadError(f"{where}: conversation {item.conversation} mixes text and ids")
            turns[item.conversation] = item.turn + 1
        items.append(item)
    if not items:
        raise WorkloadError(f"{path}: no requests in it")
    return items


def _item(values: dict[str, Any], where: str) -> Item:
    unknown, missing = values.keys() - _FIELDS.keys(), _REQUIRED - values.keys()
    if unknown or missing:
        kind, names = ("unknown", unknown) if unknown else ("missing", missing)
        raise WorkloadError(f"{where}: {kind} field {', '.join(sorted(names))}")
    for name, value in values.items():
        if not _fits(name, value):
            raise WorkloadError(f"{where}: bad {name}: {str(value)[:40]!r}")
    whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return Item(**whole)
    except ValueError as error:
        raise WorkloadError(f"{where}: {error}") from error


def _fits(name: str, value: object) -> bool:
    if value is None:
        return _FIELDS[name].default is None
    if name in _INTEGERS:
        return type(value) is int
    if name in _NUMBERS:
        return type(value) in (int, float)
    if name == "prompt" and isinstance(value, str):
        return True
    ids = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    return ids and name in _ID_LISTS and (name != "draw" or len(value) == 2)  # type: ignore[arg-type]
