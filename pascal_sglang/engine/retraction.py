"""Held requests go back to the waiting queue without their KV, as SGLang's retracted ones do."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.engine.plan_executor import Governor
from pascal_sglang.policy.request import Place


def retract_held(governor: Governor) -> None:
    """Drop the KV of every held request. No step is in flight.

    A request handed over to another instance waits only if that instance sends it back.
    """
    for req in governor.ladder.drop():
        if req not in governor.ladder.moving:
            wait_again(governor, req)


def wait_again(governor: Governor, req: Req) -> None:
    """The request, which holds no KV, waits to be prefilled again."""
    governor.stopped(req, Place.WAITING)
    governor.scheduler.waiting_queue.append(req)
