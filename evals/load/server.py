"""A server process tree of our own on a free port of this machine, with its output in a file."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from evals.load import auth

SUPERVISE = Path(__file__).with_name("supervise.py")
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 40
IDLE_TIMEOUT_S = 60
POLL_S = 0.2
# Below those that the system gives to outgoing connections, one of which could take a port before
# the server binds it, half a minute from now; above 22000 to 29999, of which SGLang draws its own.
PORTS = range(30_000, 32_000)


class ArmError(RuntimeError):
    """An arm that cannot be run; the message says why."""


class Process(Protocol):
    """What of `subprocess.Popen` waiting for a server needs."""

    def poll(self) -> int | None: ...


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would switch pascal_sglang on or tune an engine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PASCAL_SGLANG", "SGLANG_"))}
    return {**kept, **extra}


def is_free(port: int) -> bool:
    """Whether a server could listen there on this host now."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """One of `PORTS`."""
    for port in random.sample(PORTS, 100):
        if is_free(port):
            return port
    raise ArmError("no free port")


class LocalServer:
    """The address and the log of a server; a subclass starts `process` with both, and ends it."""

    process: Process

    def __init__(
        self, name: str, start_timeout_s: float = START_TIMEOUT_S, port: int | None = None
    ) -> None:
        self.port = free_port() if port is None else port
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.address = ("--host", "127.0.0.1", "--port", str(self.port))
        self._start_timeout_s = start_timeout_s
        descriptor, log = tempfile.mkstemp(prefix=f"{name}-", suffix=".log")
        os.close(descriptor)
        self.log = Path(log)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises ArmError with the end of the output for a server that ended or takes too long.

        timeout_s: how long that is from now on, if not what it was started with."""
        wait_s = self._start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + wait_s
        while not self._answers():
            if self.process.poll() is not None:
                raise ArmError(f"server ended at start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ArmError(f"server not ready in time: {self._last_words()}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=5):
                return True
        except OSError:
            return False

    def _last_words(self) -> str:
        text = self.output.strip()
        return text.splitlines()[-1] if text else "(no output)"


class Server(LocalServer):
    """A server for a measurement; leaving the context takes it all down, and so does any other end
    of this process."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], start_timeout_s: float
    ) -> None:
        """command: how to start it, without its address."""
        super().__init__(f"evals-{name}", start_timeout_s)
        auth.use_key_of(command)
        with self.log.open("ab") as output:
            # What watches the server and has its exit code.
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [
                    *(sys.executable, str(SUPERVISE), "--stop-timeout", str(STOP_TIMEOUT_S)),
                    *(*command, *self.address),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,
                env=environment(env),
            )

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's own process, once it answers."""
        (server,) = psutil.Process(self.process.pid).children()
        return int(server.pid)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(STOP_TIMEOUT_S + 20)

    def flush(self) -> None:
        """Wait until nothing runs and empty the prefix cache; the server refuses while it is busy,
        so one request does both."""
        request = urllib.request.Request(
            f"{self.base_url}/flush_cache?timeout={IDLE_TIMEOUT_S}",
            method="POST",
            headers=auth.headers(),
        )
        try:
            with urllib.request.urlopen(request, timeout=IDLE_TIMEOUT_S + 10):
                return
        except (OSError, urllib.error.HTTPError) as error:
            raise ArmError(f"server did not become idle: {error}") from error
