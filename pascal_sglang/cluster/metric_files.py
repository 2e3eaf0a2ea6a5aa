"""Metric files on a full disk.

`prometheus_client` maps sparse files into memory, one per process and type. A page that the disk
cannot back any more ends the process with SIGBUS at the first request of a new kind.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# What an entry takes beyond its key: two numbers, its length, padding.
ENTRY_BYTES = 32


def survive_a_full_disk() -> None:
    """From now on this process's metric files have their disk blocks before they are written. Where
    the disk has none, the figures go on in memory, and `/metrics` shows the last ones written.

    SGLang has to have said by then where the files are: `prometheus_client` reads that on import.
    """
    from prometheus_client.mmap_dict import MmapedDict

    if not hasattr(MmapedDict._init_value, "__wrapped__"):
        MmapedDict._init_value = reserving(MmapedDict._init_value)  # type: ignore[method-assign]


def reserving(original: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """Around `MmapedDict._init_value`, which writes where nothing has been written before."""

    @functools.wraps(original)
    def init_value(values: Any, key: str) -> None:
        end = values._used + len(key.encode()) + ENTRY_BYTES
        try:
            os.posix_fallocate(values._f.fileno(), 0, end)
        except OSError as error:
            logger.warning("pascal_sglang: metrics of this process stay in memory: %s", error)
            _to_memory(values)
        original(values, key)

    return init_value


def _to_memory(values: Any) -> None:
    """The entries go on in a file that no disk has to back."""
    file = os.fdopen(os.memfd_create("pascal-metrics"), "r+b")
    file.truncate(values._capacity)
    mapped = mmap.mmap(file.fileno(), values._capacity)
    mapped[: values._used] = values._m[: values._used]
    values._f.close()
    values._f, values._m = file, mapped
