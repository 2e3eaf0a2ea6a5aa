"""Requests that were moved here and that their source has ended, because this instance was stopped
and did not answer. They end here without a word: their client has been told."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from pascal_sglang.engine.req_attributes import timeline_of
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


@dataclass(kw_only=True, slots=True, eq=False)
class Revoked:
    """True while some of them still run, until their next result."""

    scheduler: SchedulerProtocol
    states: RequestStates
    _running: set[Req] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, req: Req) -> None:
        """Give back what the request holds, now or with its next result."""
        # Its source counts it. A step in flight brings it up again after its end.
        timeline_of(req).finish(self.states.pass_info.now)
        waiting = self.scheduler.waiting_queue
        if req in waiting:
            waiting.remove(req)
        elif req not in self.states.paused_requests.forget(lambda held: held is req):
            req.to_finish = FINISH_ABORT()
            self._running.add(req)
            return
        self.scheduler._release_aborted_request(req)
        self.states.ended(req)

    def without(self, reqs: list[Req]) -> list[Req]:
        """Those of `reqs` whose tokens are to leave."""
        for req in [r for r in self._running if r.finished()]:
            req.finished_output = True  # SGLang passes over it where it comes again.
            self._running.remove(req)
        return [req for req in reqs if req not in self._running and not req.finished_output]
