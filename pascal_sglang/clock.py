"""The one clock of this package: seconds that only grow, the same in all processes of a host.

It is the clock of SGLang's own time stamps. A reading has one of two meanings:

- The time of a pass. TP rank 0 reads it once, at the start of the pass, and all ranks decide by it
  (`PassInfo.now`). Control messages bring the time at which rank 0 took them in, before that.
- The time of an event or of a length, read where it happens: tokens leave, a request ends. It is
  reported, and no decision that ranks share depends on it.
"""

from __future__ import annotations

import time


def now() -> float:
    """This instant."""
    return time.perf_counter()
