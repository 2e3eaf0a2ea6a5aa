"""The one clock of this package: seconds that only grow, the same in all processes of a host.

Readings of two hosts say nothing of each other. What travels between hosts, says which clock its
times are of (`clock.name`), and is brought onto that of its target (`request_snapshot`).

It is the clock of SGLang's own time stamps. A reading has one of two meanings:

- The time of a pass. TP rank 0 reads it once, at the start of the pass, and all ranks decide by it
  (`PassInfo.now`). Control messages bring the time at which rank 0 took them in, before that.
- The time of an event or of a length, read where it happens: tokens leave, a request ends. It is
  reported, and no decision that ranks share depends on it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def name() -> str:
    """Of this clock: two processes with the same one can compare their readings. It begins with
    each start of the system, and a container may have its own."""
    found = ""
    with suppress(OSError):
        found += Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        found += os.readlink("/proc/self/ns/time")
    return found


def now() -> float:
    """This instant."""
    return time.perf_counter()
