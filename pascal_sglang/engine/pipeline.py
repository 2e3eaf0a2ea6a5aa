"""Agreement among pipeline stages: each plans for itself, from the same requests in the same order.

SGLang's stages take the same requests, run their micro-batches in the same order and see the same
outputs. What a plan needs besides is the clock: the first stage's goes to the others with the
requests of each turn. With it goes a checksum of what the first stage has decided so far. A stage
that has decided otherwise would compute other requests' tokens in their place, and the instance
ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.runtime_context import get_parallel

from pascal_sglang import clock
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import RanksDiverged, agree


@dataclass(frozen=True, slots=True)
class StageTurn:
    """The first stage's clock in seconds, and the checksum of its decisions before this turn."""

    now: float
    decided: int


@dataclass(slots=True, eq=False)
class Pipeline:
    """What the stages of one instance agree on. Where there is one stage, nothing is said."""

    scheduler: SchedulerProtocol
    stages: int = 1
    # Whether this is the first stage.
    leads: bool = True
    # Micro-batches that take turns: one turn of them all is one pass of a request.
    micro_batches: int = 1
    # The clock of this turn; None where there is one stage, which reads its own.
    now: float | None = None
    _decided: int = 0

    def begin(self, requests: list[Any]) -> list[Any]:
        """Begin a turn with the requests that the first stage has taken in. Returns what it hands
        on to the next stage."""
        if self.stages == 1 or not self.leads:
            return requests
        self.now = float(agree(self.scheduler, clock.now()))
        return [*requests, StageTurn(self.now, self._decided)]

    def hear(self, turn: StageTurn) -> None:
        """Take over the first stage's clock. Raises: RanksDiverged."""
        self.now = turn.now
        if turn.decided != self._decided:
            raise RanksDiverged(
                "pascal_sglang: a pipeline stage has decided otherwise than the first one; this "
                "instance ends"
            )

    def decide(self, rids: Iterable[str]) -> None:
        """Requests start, or are ranked, in this order."""
        if self.stages > 1:
            for rid in rids:
                self._decided = zlib.crc32(rid.encode(), self._decided)


def pipeline_of(scheduler: SchedulerProtocol) -> Pipeline:
    """The pipeline that a live scheduler is a stage of."""
    parallel = get_parallel()
    if parallel.pp_size == 1:
        return Pipeline(scheduler)
    turns = parallel.pp_size + parallel.pp_async_batch_depth
    return Pipeline(scheduler, parallel.pp_size, parallel.pp_rank == 0, turns)
