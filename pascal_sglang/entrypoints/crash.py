"""A process of the server has died: clients hear why, and the server ends, cleanly and whole.

SGLang notices the death within a second too. It then holds up its event loop for a minute to
collect diagnostics, whatever waits, and ends by killing itself: clients see a reset connection.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any

import psutil

from pascal_sglang.cluster.private_folder import remove_all
from pascal_sglang.cluster.scheduler_processes import end_of

logger = logging.getLogger(__name__)

EXIT_CRASHED = 1
# For requests in flight to be answered: seconds between rounds, and rounds. Time in which the
# process stands still is none for that, nor part of the limits below.
ROUND_S, ROUNDS = 0.05, 10
# After this many seconds the server ends, whatever still hangs.
LIMIT_S = 6.0
# The same where an operator asks for SGLang's dumps of live schedulers by name.
DIAGNOSTICS_S = 120.0


# Set on SGLang's tokenizer manager once the server ends: nothing is held back any more.
ENDING = "pascal_ending"


def is_ending(manager: Any) -> bool:
    """Whether the server ends, asked to or after a death."""
    return bool(manager.gracefully_exit or getattr(manager, ENDING, False))


class ProcessWatch:
    """In the place of SGLang's `SubprocessWatchdog`: sees the end of a process when it happens."""

    def __init__(
        self, processes: list[Any], names: list[str], crashed: Callable[[str], None]
    ) -> None:
        """crashed: gets one line, from another thread."""
        self._names = {end_of(p): (p, name) for p, name in zip(processes, names, strict=True)}
        self._crashed = crashed
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._run, name="process_watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Processes may end from now on."""
        if self._stopped >= 0:
            os.close(self._stopped)
            self._stopped = -1

    def _run(self) -> None:
        while self._names:
            ended = multiprocessing.connection.wait([self._stop, *self._names])
            if self._stop in ended:
                return
            for sentinel in ended:
                assert isinstance(sentinel, int)
                process, name = self._names.pop(sentinel)
                process.join()
                if process.exitcode:  # SGLang's end with 0 when they are asked to.
                    self._crashed(f"{name} (process {process.pid}) ended with {process.exitcode}")


class CrashShutdown:
    """Ends a server of which a part is missing.

    reason: one line; None while nothing has happened.
    """

    def __init__(self, manager: Any, clean_up: Callable[[], None] = remove_all) -> None:
        """manager: SGLang's tokenizer manager, or the router of several."""
        self._manager = manager
        self._clean_up = clean_up
        self._begun = threading.Lock()
        self.reason: str | None = None

    def begin(self, reason: str) -> None:
        """From any thread, any number of times; the first reason counts."""
        if not self._begun.acquire(blocking=False):
            return
        self.reason = reason
        logger.error("pascal_sglang: %s; the server ends", reason)
        loop = getattr(self._manager, "event_loop", None)
        limit = DIAGNOSTICS_S if _requested_diagnostics() else LIMIT_S
        if loop is None or loop.is_closed():
            # Nobody has asked for anything yet; or other processes serve HTTP, and end with us.
            loop, limit = None, 0.0
        threading.Thread(target=self._force, args=(limit,), daemon=True).start()
        if loop is not None:
            loop.call_soon_threadsafe(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._end())

    def handle_signals(self) -> None:
        """A child that fails sends SIGQUIT to its parent; only the main thread can take it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, lambda *_: self._on_sigquit())
        stock: Any = getattr(self._manager, "signal_handler_class", None)
        if stock is None:
            return
        on_sigquit = self._on_sigquit

        class PascalSignalHandler(stock):
            """SGLang installs it on the event loop, with the first request."""

            def running_phase_sigquit_handler(self, *_: Any) -> None:
                on_sigquit()

        self._manager.signal_handler_class = PascalSignalHandler

    def _on_sigquit(self) -> None:
        self.begin("a process of the server has failed (SIGQUIT)")

    async def _end(self) -> None:
        manager = self._manager
        manager.generate_request = self._refuse
        setattr(manager, ENDING, True)
        asked = _requested_diagnostics()
        if manager.crash_dump_folder:
            with ExitStack() as without:
                for setting in _diagnostics():
                    without.enter_context(setting.override(False))
                manager.dump_requests_before_crash()
        for _ in range(ROUNDS):
            self._fail_all()
            await asyncio.sleep(ROUND_S)
        if asked:
            manager.crash_dump_performed, manager.crash_dump_folder = False, ""
            await asyncio.to_thread(manager.dump_requests_before_crash)
        await asyncio.to_thread(end_children)
        if manager._server_stop_hook is None:
            self._force(0.0)
        for task in manager.asyncio_tasks:
            task.cancel()
        manager._server_stop_hook()

    def _fail_all(self) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        reason = {
            "type": "abort",
            "message": f"The server ends: {self.reason}.",
            "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        }
        for rid in list(self._manager.rid_to_state):
            try:
                self._manager._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))
            except Exception:
                logger.exception("pascal_sglang: cannot answer request %s", rid)
                self._manager.rid_to_state.pop(rid, None)

    async def _refuse(self, *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        from fastapi import HTTPException

        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, f"The server ends: {self.reason}.")
        yield  # A generator, as what it stands for.

    def _force(self, limit_s: float) -> None:
        for _ in range(round(limit_s / ROUND_S)):
            time.sleep(ROUND_S)
        end_children()
        self._clean_up()
        print(f"pascal_sglang: error: {self.reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_CRASHED)


def end_children() -> None:
    """Kill every process below this one and wait for it; whoever stays is logged."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    _, left = psutil.wait_procs(children, timeout=LIMIT_S)
    if left:
        logger.error("pascal_sglang: processes that do not end: %s", [p.pid for p in left])


def _diagnostics() -> tuple[Any, Any]:
    """SGLang's settings for dumps of live schedulers; they are on by default, and take a minute."""
    from sglang.srt.environ import envs

    return envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH, envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH


def _requested_diagnostics() -> bool:
    return any(setting.is_set() and setting.get() for setting in _diagnostics())
