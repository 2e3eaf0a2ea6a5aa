"""SIGTERM to one scheduler of several: its instance is drained before it ends.

With `--pascal-drain-on-term`. The process tells the controller, serves on while its requests move
away or end, and ends when the controller says that none is left. The controller alone remembers: it
says so at once after a second SIGTERM, and after the first where no other instance takes requests;
a drain that is lifted takes the first back. A process that has not come to tell it ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from sglang.srt.managers.io_struct import ShutdownReq
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster.control_channel import CONTROLLER, ControlSender
from pascal_sglang.cluster.messages import MayEnd, Terminating
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.instances import own_instance

logger = logging.getLogger(__name__)


class Termination:
    """The end of this process. Every TP rank has one: any of them may get the signal."""

    def __init__(self, scheduler: SchedulerProtocol, place: str) -> None:
        """place: that of the control sockets."""
        self.scheduler = scheduler
        self._sender = ControlSender(place, own_instance())
        # SIGTERM has come, and the controller does not know yet.
        self._unsaid = False
        if threading.current_thread() is not threading.main_thread():
            logger.warning("pascal_sglang: SIGTERM ends this process at once, in another's thread")
            return
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        if self._unsaid:
            _end_now()
        self._unsaid = True

    def step(self) -> None:
        """Once a pass."""
        if self._unsaid:
            said = Terminating(own_instance(), get_parallel().attn_tp_rank)
            self._unsaid = not self._sender.send(CONTROLLER, said)

    def may_end(self, word: MayEnd) -> None:
        """The controller's answer, which every TP rank hears in the same pass."""
        if word.problem:
            logger.warning("pascal_sglang: SIGTERM: %s", word.problem)
            _end_now()
        logger.info("pascal_sglang: no request is left on this instance, which was told to end")
        self.scheduler.handle_shutdown(ShutdownReq())


def _end_now() -> None:
    """As SIGTERM ends a process that does not handle it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
