"""Control messages reach every TP rank in the same pass: they travel with the requests that rank 0
takes in and broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import ControlReceiver, ControlSender


@dataclass(frozen=True, slots=True)
class ControlBatch:
    """Control messages that came in before a pass, unread. `now`: rank 0's clock in seconds."""

    now: float
    messages: list[bytes]


@dataclass(kw_only=True, slots=True, frozen=True)
class PascalRequestReceiver(SchedulerRequestReceiver):
    """SGLang's, with the control socket as one more source on rank 0."""

    control_receiver: ControlReceiver

    def _pull_raw_reqs(self) -> list[Any] | None:
        requests: list[Any] | None = SchedulerRequestReceiver._pull_raw_reqs(self)
        if requests is not None and (control_batch := self.control_receiver.receive()):
            # First: an abort that comes with them is to find a request where it then is.
            requests.insert(0, ControlBatch(clock.now(), control_batch))
        return requests

    def _split_work_and_control_reqs(self, recv_reqs: list[Any]) -> tuple[list[Any], list[Any]]:
        """With DP attention, what is not work goes from the first instance to all of them; a
        control batch is for its own instance alone."""
        work, control = SchedulerRequestReceiver._split_work_and_control_reqs(self, recv_reqs)
        ours = [r for r in control if isinstance(r, ControlBatch)]
        return [*ours, *work], [r for r in control if not isinstance(r, ControlBatch)]


class Rank0Sender:
    """Writes messages on rank 0; on the other ranks it is silent."""

    def __init__(self, control_sender: ControlSender | None) -> None:
        self.control_sender = control_sender

    def send(self, to: str | int, said: Sequence[Any]) -> None:
        if self.control_sender is not None:
            for message in said:
                self.control_sender.send(to, message)
