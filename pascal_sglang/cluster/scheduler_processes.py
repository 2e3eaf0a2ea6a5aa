"""The scheduler processes that the controller started, and what their end means."""

from __future__ import annotations

import logging
import os
import signal
from multiprocessing.process import BaseProcess
from typing import Any

logger = logging.getLogger(__name__)

# A scheduler that asks for the server's end is itself about to end; if nobody has after this many
# seconds, one hangs and the whole server ends as SGLang means it to.
QUIT_S = 15.0


def end_of(process: Any) -> int:
    """A file descriptor that becomes readable when the process ends.

    Python's own sentinel is a pipe that the process closes with its end; a child that it has forked
    holds it open.
    """
    if isinstance(process, BaseProcess) and process.pid is not None:
        try:
            return os.pidfd_open(process.pid)
        except OSError:  # A kernel without them, or a process that has ended already.
            pass
    sentinel: int = process.sentinel
    return sentinel


class SchedulerProcesses:
    """Watches scheduler processes.

    homes: the instance of each, by process id, once they have said it.
    """

    def __init__(self, processes: list[Any], homes: dict[int, int]) -> None:
        """processes: SGLang's, or what stands for them (`ray_deaths`)."""
        self.homes = homes
        self._alive = {end_of(p): p for p in processes if p is not None and p.pid in homes}
        self._asked_to_quit = False
        self._quit_at: float | None = None

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a process ends."""
        return list(self._alive)

    def ended(self, sentinel: int) -> tuple[int, bool]:
        """The instance of the process that has just ended, and whether in order; its other ranks,
        which wait for it in vain, are ended too."""
        process = self._alive.pop(sentinel)
        process.join()
        instance = self.homes[process.pid]
        self._quit_at = None
        if process.exitcode:  # None of them ends with 0 but at shutdown.
            logger.error(
                "pascal_sglang: a scheduler of instance %d ended with %s",
                instance,
                process.exitcode,
            )
        for other in self._alive.values():
            if self.homes[other.pid] == instance:
                other.kill()
        return instance, process.exitcode == 0

    def outlive_schedulers(self) -> None:
        """SGLang's schedulers send SIGQUIT to their parent before they end with an exception: take
        note instead of ending with them. Only from the main thread."""
        signal.signal(signal.SIGQUIT, self._note_quit)

    def _note_quit(self, *_: object) -> None:
        self._asked_to_quit = True

    def tick(self, now: float) -> None:
        """Once a second."""
        if self._asked_to_quit:
            self._asked_to_quit, self._quit_at = False, now + QUIT_S
        if self._quit_at is not None and now > self._quit_at:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGQUIT)
