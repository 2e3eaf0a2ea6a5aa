"""A process of the server dies: seen at once, requests are answered, and the server ends."""

import asyncio
import importlib
import multiprocessing
import os
import queue
import signal
import time
from types import SimpleNamespace

import fastapi
import psutil
import pytest

from pascal_sglang.entrypoints import crash
from pascal_sglang.entrypoints.crash import EXIT_CRASHED, CrashShutdown, ProcessWatch, is_ending


def started(target, *args):
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def test_a_killed_process_is_named_and_one_that_was_asked_to_end_is_not():
    processes = [started(time.sleep, 600), started(time.sleep, 600), started(int)]
    seen: queue.Queue = queue.Queue()
    watch = ProcessWatch(processes, ["a", "b", "c"], seen.put)
    watch.start()
    try:
        processes[2].join(60)
        began = time.monotonic()
        processes[1].kill()
        line = seen.get(timeout=30)
        assert line == f"b (process {processes[1].pid}) ended with {-signal.SIGKILL}"
        assert time.monotonic() - began < 10
        watch.stop()
        watch._thread.join(30)
        assert not watch._thread.is_alive()
        assert seen.empty()
    finally:
        watch.stop()
        for process in processes:
            process.kill()
            process.join()


class Manager:
    """What `CrashShutdown` knows of SGLang's tokenizer manager."""

    crash_dump_folder = ""
    gracefully_exit = False
    signal_handler_class = object

    def __init__(self, loop, stop):
        self.event_loop, self._server_stop_hook = loop, stop
        self.rid_to_state = {"a": object(), "b": object()}
        self.asyncio_tasks = set()
        self.ended = []

    def _handle_abort_req(self, message):
        self.ended.append((message.rid, message.finished_reason))
        del self.rid_to_state[message.rid]


@pytest.fixture
def harmless(monkeypatch):
    importlib.import_module("sglang.srt.managers.io_struct")  # A server has it by then.
    monkeypatch.setattr(crash, "end_children", lambda: None)
    monkeypatch.setattr(CrashShutdown, "_force", lambda self, limit_s: None)


def test_requests_are_answered_before_the_server_stops(harmless):
    async def scene():
        stopped = asyncio.Event()
        manager = Manager(asyncio.get_running_loop(), stopped.set)
        shutdown = CrashShutdown(manager)
        shutdown.begin("the detokenizer ended")
        shutdown.begin("and then another one")
        await asyncio.sleep(0.2)
        manager.rid_to_state["late"] = object()
        with pytest.raises(fastapi.HTTPException) as refused:
            await anext(manager.generate_request(None))
        await asyncio.wait_for(stopped.wait(), 30)
        assert is_ending(manager), "paced streams hold nothing back"
        return manager, refused.value

    manager, refused = asyncio.run(scene())
    assert [rid for rid, _ in manager.ended] == ["a", "b", "late"]
    for _, reason in manager.ended:
        assert reason["status_code"] == 503
        assert reason["message"] == "The server ends: the detokenizer ended."
    assert (refused.status_code, refused.detail) == (503, reason["message"])


def hangs(folder):
    crash.LIMIT_S = 0.5
    crash._requested_diagnostics = lambda: False  # Looking costs the import of SGLang.
    loop = SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=lambda *_: None)
    shutdown = CrashShutdown(SimpleNamespace(event_loop=loop), lambda: os.rmdir(folder))
    shutdown.handle_signals()
    child = started(time.sleep, 600)
    (folder.parent / "child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGQUIT)
    time.sleep(600)


def test_a_loop_that_hangs_does_not_keep_the_server(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    process = started(hangs, folder)
    process.join(120)
    assert process.exitcode == EXIT_CRASHED
    assert not folder.exists()
    child = int((tmp_path / "child").read_text())
    left = psutil.Process(child).status() if psutil.pid_exists(child) else psutil.STATUS_DEAD
    assert left in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)
