"""Pauses in SGLang's books of a request: the time in its queue, and the time-outs that end it.

A paused request counts as one that SGLang has retracted: it is back in the queue, its wait there is
queue time, and its waiting time-out runs from the pause on. The running time-out counts from its
first forward pass and is looked at while it runs.

An answer is paused because its reader still has something to read. Nobody waits for it yet, so its
waiting time-out runs from when the reader has caught up.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req

from pascal_sglang import clock
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.policy.queue import WaitQueue

# SGLang's own words, which clients may look for.
MESSAGE = "Request waiting timeout reached."


def entered_queue(req: Req) -> None:
    """The request has run and waits from now on; nothing happens to one that waits already."""
    if req.time_stats.last_forward_entry_time:
        req.time_stats.set_wait_queue_entry_time()


def left_queue(req: Req) -> None:
    """The request decodes from now on, without a prefill."""
    req.time_stats.set_forward_entry_time()


def waiting_since(req: Req) -> float:
    """When somebody began to wait for the request, in seconds of `clock.now`."""
    entered: float = req.time_stats.wait_queue_entry_time
    pacer = state_of(req).pacer
    return max(entered, pacer.shown) if pacer.delivered else entered


def longest_waits(queue: WaitQueue, now: float) -> dict[str, float]:
    """Seconds for which the request that has waited longest has, by the name of its class."""
    found: dict[str, float] = {}
    for state in queue.requests():
        if not state.internal and (since := waiting_since(state.handle)) > 0:
            name = queue.policy.class_names[state.priority_class]
            found[name] = max(found.get(name, 0.0), now - since)
    return found


def with_paused(
    aborts: list[AbortReq], waiting: Iterable[Req], paused: Iterable[Req]
) -> list[AbortReq]:
    """SGLang's time-outs, which know the waiting queue alone, as they should be.

    Added are those of paused requests; dropped those of answers whose reader has not caught up.
    """
    timeout_s = envs.SGLANG_REQ_WAITING_TIMEOUT.get()
    if timeout_s <= 0:
        return aborts
    deadline = clock.now() - timeout_s
    if any(abort.abort_message == MESSAGE for abort in aborts):
        ahead = {req.rid for req in waiting if waiting_since(req) >= deadline}
        aborts = [a for a in aborts if a.abort_message != MESSAGE or a.rid not in ahead]
    reason = {
        "type": "abort",
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        "message": MESSAGE,
    }
    late = [req.rid for req in paused if 0 < waiting_since(req) < deadline]
    return aborts + [AbortReq(rid=r, abort_message=MESSAGE, finished_reason=reason) for r in late]
