"""Pauses in SGLang's books of a request: the time in its queue, and the time-outs that end it.

A paused request counts as one that SGLang has retracted: it is back in the queue, its wait there is
queue time, and its waiting time-out runs from the pause on. The running time-out counts from its
first forward pass and is looked at while it runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from http import HTTPStatus

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req

# SGLang's own words, which clients may look for.
MESSAGE = "Request waiting timeout reached."


def entered_queue(req: Req) -> None:
    """The request has run and waits from now on; nothing happens to one that waits already."""
    if req.time_stats.last_forward_entry_time:
        req.time_stats.set_wait_queue_entry_time()


def left_queue(req: Req) -> None:
    """The request decodes from now on, without a prefill."""
    req.time_stats.set_forward_entry_time()


def waiting_timeouts(paused: Iterable[Req]) -> list[AbortReq]:
    """An abort for each paused request that has waited for longer than SGLang's time-out."""
    timeout_s = envs.SGLANG_REQ_WAITING_TIMEOUT.get()
    if timeout_s <= 0:
        return []
    deadline = time.perf_counter() - timeout_s
    reason = {
        "type": "abort",
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        "message": MESSAGE,
    }
    return [
        AbortReq(rid=req.rid, abort_message=MESSAGE, finished_reason=reason)
        for req in paused
        if 0 < req.time_stats.wait_queue_entry_time < deadline
    ]
