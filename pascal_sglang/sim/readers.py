"""Whether an instance's answers meet their objective, without asking every reader every time."""

from __future__ import annotations

import heapq

from pascal_sglang.sim.batch import Batch
from pascal_sglang.sim.request import Job


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
        self.answering: dict[Job, None] = {}
        self._dry: list[tuple[float, int, Job]] = []
        self._suspects: dict[Job, None] = {}

    def begins(self, job: Job) -> None:
        """The job answers here from now on."""
        self.answering[job] = None
        if job.pacer.delivered:
            self.look_later(job)

    def look_later(self, job: Job) -> None:
        heapq.heappush(self._dry, (job.pacer.last_shown + job.pacer.tpot, job.seq, job))

    def ends(self, job: Job) -> None:
        self.answering.pop(job, None)
        self._suspects.pop(job, None)

    def on_pace(self, now: float) -> bool:
        """The status, with the batch advanced to `now`."""
        dry = self._dry
        while dry and dry[0][0] < now:
            job = heapq.heappop(dry)[2]
            if job in self.answering:
                self._suspects[job] = None
        good = True
        for job in list(self._suspects):
            if job in self.batch:
                self.batch.sync(job)
            waits = job.pacer.last_shown + job.pacer.tpot < now
            bad = self.sticky and job.pacer.qoe < self.slo
            if bad or (waits and not self.sticky):
                good = False
            if not bad and not waits:
                del self._suspects[job]
                self.look_later(job)
        return good
