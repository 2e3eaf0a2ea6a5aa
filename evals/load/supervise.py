"""Runs a command for as long as standard input stays open, then stops all of it.

`python evals/load/supervise.py [--stop-timeout SECONDS] COMMAND...`. The process that starts this
one holds the other end of the pipe. The kernel closes that end on every way out of its holder,
SIGKILL included, so the command never outlives it. The exit code is the command's own, 128 and the
signal's number after a signal. Needs nothing beyond Python's library.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading

STOP_TIMEOUT_S = 20.0
ENDINGS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Command:
    """A command in a process group of its own."""

    def __init__(self, words: list[str], stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._ended = threading.Event()
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait(self) -> int:
        """Wait for its end, take what it left in its group along; its exit code."""
        # Not reaped before its group has been killed: until then no other process has its number.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._ended.set()
        self._signal_group(signal.SIGKILL)
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does, and kill its group when it takes too long."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGINT)
        if not self._ended.wait(self._stop_timeout_s):
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stop-timeout", type=float, default=STOP_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    if not asked.command:
        parser.error("no command")
    # A signal to the group of the parent is not for this process. The leader of a group has its own
    # already.
    with contextlib.suppress(PermissionError):
        os.setsid()
    stopping = threading.Event()
    # Handlers, not SIG_IGN, which the command would inherit.
    for number in ENDINGS:
        signal.signal(number, lambda _number, _frame: stopping.set())
    try:
        command = Command(asked.command, asked.stop_timeout)
    except OSError as error:
        print(f"supervise: error: {asked.command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_wait_for_end_of_input, args=(stopping,), daemon=True).start()
    threading.Thread(target=_stop_when, args=(stopping, command), daemon=True).start()
    return command.wait()


def _wait_for_end_of_input(stopping: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
    stopping.set()


def _stop_when(stopping: threading.Event, command: Command) -> None:
    stopping.wait()
    command.stop()


if __name__ == "__main__":
    sys.exit(main())
