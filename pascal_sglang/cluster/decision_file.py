"""A file of decisions, one JSON object a line, that all instances of a host append to."""

from __future__ import annotations

import logging
import os
import stat
import time
from typing import Any

import orjson

logger = logging.getLogger(__name__)


class DecisionFile:
    """Appends lines to `path`, each in one write, which other processes do not cut in two.

    failed: lines that were not written whole, for want of space, say; the first is logged.
    """

    def __init__(self, path: str, dp_rank: int = 0) -> None:
        """dp_rank: the instance whose decisions these are.

        Raises: OSError if the file cannot be opened, or is a pipe or a device.
        """
        self.path = path
        self.dp_rank = dp_rank
        self.failed = 0
        self._torn = False
        # Without blocking: a pipe that nobody reads would hold us up here.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self.close()
            raise OSError(0, "not a regular file")

    def append(self, said: dict[str, Any]) -> None:
        """Write one line, with unix time in seconds. A failure is counted, and the next line is
        tried again."""
        whole = {"time": round(time.time(), 6), "dp_rank": self.dp_rank, **said}
        line = (b"\n" if self._torn else b"") + orjson.dumps(whole) + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            self._lost(str(error))
            return
        self._torn = written < len(line)
        if self._torn:
            self._lost("no space for a whole line")

    def close(self) -> None:
        os.close(self._file)

    def _lost(self, why: str) -> None:
        if not self.failed:
            logger.error("pascal_sglang: cannot write to %s: %s", self.path, why)
        self.failed += 1
