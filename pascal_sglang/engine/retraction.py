"""Held requests go back to the waiting queue without their KV, as SGLang's retracted ones do."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.policy.request import RequestStatus


def retract_held(executor: PlanExecutor) -> None:
    """Drop the KV of every held request. No step is in flight.

    A request handed over to another instance waits only if that instance sends it back.
    """
    for req in executor.paused_requests.drop():
        if req not in executor.paused_requests.moving:
            wait_again(executor, req)


def wait_again(executor: PlanExecutor, req: Req) -> None:
    """The request, which holds no KV, waits to be prefilled again."""
    executor.stopped(req, RequestStatus.WAITING)
    executor.scheduler.waiting_queue.append(req)
