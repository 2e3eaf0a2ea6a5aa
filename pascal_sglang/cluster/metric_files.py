"""Metric files on a full disk.

`prometheus_client` maps sparse files into memory, one per process and type. A page that the disk
cannot back any more ends the process with SIGBUS at the first request of a new kind.
"""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# The head of a file, of which the client goes on to write the size it makes a new file.
HEAD_BYTES = 1 << 16
# What an entry takes beyond its key: two numbers, its length, padding.
ENTRY_BYTES = 32


def survive_a_full_disk() -> None:
    """From now on this process's metric files have their disk blocks before they are written. Where
    the disk has none, the figures go on in memory, and `/metrics` shows the last ones written.

    SGLang has to have said by then where the files are: `prometheus_client` reads that on import.
    """
    from prometheus_client.mmap_dict import MmapedDict

    if not hasattr(MmapedDict._init_value, "__wrapped__"):
        MmapedDict.__init__ = opening(MmapedDict.__init__)  # type: ignore[method-assign]
        MmapedDict._init_value = reserving(MmapedDict._init_value)  # type: ignore[method-assign]


def opening(original: Callable[..., None]) -> Callable[..., None]:
    """Around `MmapedDict.__init__`, which writes the head of a new file."""

    @functools.wraps(original)
    def init(values: Any, filename: str, read_mode: bool = False) -> None:
        if read_mode or _has_head(filename):
            original(values, filename, read_mode)
            return
        file = os.memfd_create("pascal-metrics")
        try:
            original(values, f"/proc/self/fd/{file}")
        finally:
            os.close(file)

    return init


def reserving(original: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """Around `MmapedDict._init_value`, which writes where nothing has been written before."""

    @functools.wraps(original)
    def init_value(values: Any, key: str) -> None:
        end = values._used + len(key.encode()) + ENTRY_BYTES
        if not _reserve(values._f.fileno(), end):
            _to_memory(values)
        original(values, key)

    return init_value


def _has_head(filename: str) -> bool:
    """Whether the disk backs the head of the file, which may not exist yet."""
    try:
        with open(filename, "ab") as file:
            return os.fstat(file.fileno()).st_size > 0 or _reserve(file.fileno(), HEAD_BYTES)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False


def _reserve(file: int, end: int) -> bool:
    """Whether the disk backs the file up to `end`. A file system that cannot say so is trusted."""
    try:
        os.posix_fallocate(file, 0, end)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            logger.warning("pascal_sglang: metrics of this process stay in memory: %s", error)
            return False
    return True


def _to_memory(values: Any) -> None:
    """The entries go on in a file that no disk has to back."""
    file = os.fdopen(os.memfd_create("pascal-metrics"), "r+b")
    file.truncate(values._capacity)
    mapped = mmap.mmap(file.fileno(), values._capacity)
    mapped[: values._used] = values._m[: values._used]
    values._f.close()
    values._f, values._m = file, mapped
