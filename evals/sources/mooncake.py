"""Traces in the Mooncake format: JSONL of `timestamp` (ms), `input_length`, `output_length` and
`hash_ids`, one id per 512 tokens of prompt, equal where prompts share a prefix.

See https://github.com/kvcache-ai/Mooncake. There is no split of the output into thinking and answer
in it; the share is drawn from the ServeGen distributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.load.items import HASH_BLOCK_TOKENS
from evals.load.lines import WorkloadError, json_lines, whole
from evals.sources.draw import Ask, Draw
from evals.sources.trace import Row, draw_trace


class Entry(NamedTuple):
    row: Row
    hash_ids: tuple[int, ...]


def draw(ask: Ask) -> Draw:
    assert ask.path is not None
    return draw_trace(
        ask,
        ((entry.row, entry.hash_ids) for entry in entries(ask.path)),
        # Blocks shrink with the prompts, so that the shared part keeps its share.
        block_tokens=max(1, int(np.rint(HASH_BLOCK_TOKENS * ask.prompt_scale))),
    )


def entries(path: Path) -> Iterator[Entry]:
    for where, values in json_lines(path):
        at_ms: Any = values.get("timestamp")
        if type(at_ms) not in (int, float) or not at_ms >= 0:
            raise WorkloadError(f"{where}: timestamp must be milliseconds >= 0, not {at_ms!r}")
        ids = values.get("hash_ids") or []
        if not isinstance(ids, list) or any(type(each) is not int or each < 0 for each in ids):
            raise WorkloadError(f"{where}: hash_ids must be a list of whole numbers >= 0")
        row = Row(
            at_ms / 1e3, whole(values, "input_length", where), whole(values, "output_length", where)
        )
        yield Entry(row, tuple(ids))
