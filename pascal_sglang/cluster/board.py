"""What the controller shows to the process that serves HTTP: a file in their private folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import orjson

EVERY_S = 0.5


class Board:
    """One JSON object at `path`, never seen half written."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "controller.json")
        self._shown_at = float("-inf")

    def show(self, now: float, what: Callable[[], dict[str, Any]]) -> None:
        """Write it anew, at most every `EVERY_S` seconds."""
        if now - self._shown_at < EVERY_S:
            return
        self._shown_at = now
        with open(f"{self.path}.new", "wb") as file:
            file.write(orjson.dumps(what()))
        os.replace(f"{self.path}.new", self.path)


def read(path: str) -> dict[str, Any]:
    """What was last shown. Raises: OSError if nothing was."""
    with open(path, "rb") as file:
        shown: dict[str, Any] = orjson.loads(file.read())
    return shown
