"""Azure LLM inference traces: CSV or JSONL of `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`.

See https://github.com/Azure/AzurePublicDataset (2023 and 2024, CC-BY). There is no split of the
output into thinking and answer in it; the share is drawn from the ServeGen distributions.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evals.load.lines import WorkloadError, json_lines, text_lines, whole
from evals.sources.draw import Ask, Draw
from evals.sources.trace import Row, draw_trace

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def draw(ask: Ask) -> Draw:
    assert ask.path is not None
    return draw_trace(ask, ((row, ()) for row in rows(ask.path)))


def rows(path: Path) -> Iterator[Row]:
    first = next(text_lines(path), (str(path), ""))[1]
    records = json_lines(path) if first.startswith("{") else _csv_rows(path)
    for where, values in records:
        yield Row(
            _seconds(values.get(COLUMNS[0]), where),
            whole(values, COLUMNS[1], where),
            whole(values, COLUMNS[2], where),
        )


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = text_lines(path)
    header = next(lines, None)
    if header is None:
        return
    names = next(csv.reader([header[1].strip().lstrip("\ufeff")]))
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise WorkloadError(f"{header[0]}: the header lacks {', '.join(missing)}")
    for where, line in lines:
        # A short line leaves fields out, which are then reported by name.
        yield where, dict(itertools.zip_longest(names, next(csv.reader([line.strip()]))))


def _seconds(value: object, where: str) -> float:
    """Of an ISO time, UTC where it does not say, or of a number of seconds."""
    if type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    try:
        at = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError as error:
        raise WorkloadError(f"{where}: TIMESTAMP must be an ISO time, not {value!r}") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
