"""Which requests give up their KV where the very next decode step does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pascal_sglang.policy.plan import Planner
from pascal_sglang.policy.ranking import PassInfo
from pascal_sglang.policy.request import RequestState


def giving_way(
    planner: Planner, running: Sequence[RequestState], pass_info: PassInfo
) -> Iterator[RequestState]:
    """In the order in which they give way: the paused requests whose KV is on the device, then
    those of `running` that may be paused, the worst of each first."""
    yield from planner.queue.resident_worst_first(pass_info)
    yield from planner.victims.worst_first(running, pass_info)
