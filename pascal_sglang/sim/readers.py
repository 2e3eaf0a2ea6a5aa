"""Whether an instance's answers meet their objective, without asking every reader every time."""

from __future__ import annotations

import heapq

from pascal_sglang.sim.batch import Batch
from pascal_sglang.sim.request import SimRequest


class Readers:
    """The answering requests of one instance.

    A reader can only be badly off after its buffer has run dry, so each is looked at when, as far
    as known, that is, and not before.

    sticky: the paper's status, false while any answer's running QoE is below `slo`; otherwise the
    status is false while any reader waits.
    """

    def __init__(self, batch: Batch, *, sticky: bool, slo: float) -> None:
        self.batch = batch
        self.sticky = sticky
        self.slo = slo
        self.answering: dict[SimRequest, None] = {}
        self._dry: list[tuple[float, int, SimRequest]] = []
        self._suspects: dict[SimRequest, None] = {}

    def begins(self, request: SimRequest) -> None:
        """The job answers here from now on."""
        self.answering[request] = None
        if request.pacer.delivered:
            self.look_later(request)

    def look_later(self, request: SimRequest) -> None:
        heapq.heappush(
            self._dry, (request.pacer.last_shown + request.pacer.tpot, request.seq, request)
        )

    def ends(self, request: SimRequest) -> None:
        self.answering.pop(request, None)
        self._suspects.pop(request, None)

    def on_pace(self, now: float) -> bool:
        """The status, with the batch advanced to `now`."""
        dry = self._dry
        while dry and dry[0][0] < now:
            request = heapq.heappop(dry)[2]
            if request in self.answering:
                self._suspects[request] = None
        good = True
        for request in list(self._suspects):
            if request in self.batch:
                self.batch.sync(request)
            waits = request.pacer.last_shown + request.pacer.tpot < now
            if waits and not good:
                continue  # It stays a suspect, and the status is false already.
            bad = self.sticky and request.pacer.qoe < self.slo
            if bad or (waits and not self.sticky):
                good = False
            if not bad and not waits:
                del self._suspects[request]
                self.look_later(request)
        return good
