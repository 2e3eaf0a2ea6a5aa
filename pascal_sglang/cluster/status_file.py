"""What a process shows to the one that serves HTTP: a file in a private folder of the server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import orjson

logger = logging.getLogger(__name__)

EVERY_S = 0.5


class StatusFile:
    """One JSON object at `path`, never seen half written.

    every_s: seconds between two writes at least. failed: writes that failed, for want of space or
    of the folder.
    """

    def __init__(
        self, folder: str, name: str = "controller.json", *, every_s: float = EVERY_S
    ) -> None:
        self.path = os.path.join(folder, name)
        self.every_s = every_s
        self.failed = 0
        self._shown_at = float("-inf")

    def show(self, now: float, what: Callable[[], dict[str, Any]]) -> None:
        """Write it anew, at most every `every_s` seconds; one that fails is tried again then."""
        if now - self._shown_at < self.every_s:
            return
        self._shown_at = now
        shown = orjson.dumps(what())
        try:
            self._write(shown)
        except OSError as error:
            if not self.failed:
                logger.error("pascal_sglang: cannot write the status file: %s", error)
            self.failed += 1

    def _write(self, shown: bytes) -> None:
        try:
            self._replace(shown)
        except FileNotFoundError:
            # Something cleans temporary folders. Nobody else's folder is written into: `mkdir`
            # fails if there is one.
            os.mkdir(os.path.dirname(self.path), 0o700)
            self._replace(shown)

    def _replace(self, shown: bytes) -> None:
        with open(f"{self.path}.new", "wb") as file:
            file.write(shown)
        os.replace(f"{self.path}.new", self.path)


def read(path: str) -> dict[str, Any]:
    """What was last shown, and `shown_s_ago`. Raises: OSError if nothing was, ValueError if it is
    damaged."""
    with open(path, "rb") as file:
        shown: dict[str, Any] = orjson.loads(file.read())
        age = time.time() - os.fstat(file.fileno()).st_mtime
    return {**shown, "shown_s_ago": round(max(0.0, age), 3)}
