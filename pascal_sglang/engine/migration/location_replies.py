"""Takes in what the controller says where no requests move; tells it which of them live here
(`cluster.location_check`)."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from pascal_sglang.cluster.codec import BadMessage, unpack
from pascal_sglang.cluster.messages import LocationQuery, MayEnd, TurnElsewhere
from pascal_sglang.engine.kv.paused import PausedRequests
from pascal_sglang.engine.load_reporter import LoadReporter
from pascal_sglang.engine.migration.control_receiver import ControlBatch
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.instances import instance_count
from pascal_sglang.policy.prefix_namespace import Namespace

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class LocationReplies:
    """Answers of one instance."""

    scheduler: SchedulerProtocol
    paused_requests: PausedRequests
    # None on the ranks that do not report.
    load_reporter: LoadReporter | None
    # Lets the instance end, which was told to.
    end: Callable[[MayEnd], None] = lambda word: None
    # Told of requests that went to another instance though this one has most of their prompts.
    elsewhere: Callable[[array[int], Namespace], None] = lambda ids, namespace: None

    def hear(self, control_batch: ControlBatch) -> None:
        """Take in what the controller says where no requests move."""
        for data in control_batch.messages:
            try:
                _, message = unpack(data, instance_count())
            except BadMessage as error:
                logger.warning("pascal_sglang: a control message was none: %s", error)
                continue
            if isinstance(message, LocationQuery):
                self.reply(message)
            elif isinstance(message, MayEnd):
                self.end(message)
            elif isinstance(message, TurnElsewhere):
                self.elsewhere(*message.prompt())

    def reply(self, query: LocationQuery) -> None:
        """Say which of some requests live here, those on their way out included."""
        if self.load_reporter is None:
            return
        scheduler = self.scheduler
        held = self.paused_requests.held()
        queues = (scheduler.waiting_queue, scheduler.grammar_manager.grammar_queue, held)
        alive = {req.rid for queue in queues for req in queue}
        alive |= {req.rid for req in scheduler.collect_inflight_reqs()}
        if scheduler.chunked_req is not None:
            alive.add(scheduler.chunked_req.rid)
        self.load_reporter.located(query, alive)
