"""Reading files line by line, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WorkloadError(ValueError):
    """A workload that cannot be had; the message is one line."""


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """`(file:line, text)` of every line that is not blank; `.gz` is unpacked."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError) as error:
        raise WorkloadError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not UTF-8 text") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(file:line, object)` of every line that is not blank."""
    for where, line in text_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise WorkloadError(f"{where}: not a JSON object")
        yield where, value


def whole(values: dict[str, Any], name: str, where: str, *, least: int = 0) -> int:
    """`values[name]` as an integer of at least `least`; digits in text will do."""
    value = values.get(name)
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if type(number) is float and number.is_integer():
        number = int(number)
    if type(number) is not int or number < least:
        raise WorkloadError(f"{where}: {name} must be a whole number >= {least}, not {value!r}")
    return number
