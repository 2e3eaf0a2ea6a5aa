"""SIGTERM to one scheduler of several: its instance is drained before it ends.

With `--pascal-drain-on-term`. The process asks the controller, serves on while its requests move
away or end, and ends when the controller says that none is left. A second SIGTERM ends it at once,
and so does the first where no other instance takes requests.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from sglang.srt.managers.io_struct import ShutdownReq

from pascal_sglang.cluster.control_channel import CONTROLLER, ControlSender
from pascal_sglang.cluster.messages import MayEnd, Terminating
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.instances import own_instance

logger = logging.getLogger(__name__)


class Termination:
    """The end of this process. Every TP rank has one: any of them may get the signal."""

    def __init__(self, scheduler: SchedulerProtocol, folder: str) -> None:
        """folder: that of the control sockets."""
        self.scheduler = scheduler
        self._sender = ControlSender(folder, own_instance())
        # SIGTERM has come, and the controller has been asked.
        self._told = self._asked = False
        if threading.current_thread() is not threading.main_thread():
            logger.warning("pascal_sglang: SIGTERM ends this process at once, in another's thread")
            return
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        if self._told:
            _end_now()
        self._told = True

    def step(self) -> None:
        """Once a pass."""
        if self._told and not self._asked:
            self._asked = self._sender.send(CONTROLLER, Terminating(own_instance()))

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
