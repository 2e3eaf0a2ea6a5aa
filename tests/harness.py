"""Starts real servers for tests, waits for them with a time-out, and takes all of them down."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from evals.load.server import START_TIMEOUT_S, STOP_TIMEOUT_S, ArmError, LocalServer
from evals.load.server import environment as of_this_process
from tests import ports

# A shell cannot trap a signal that was ignored when it started, as under `nohup` or in a job's
# background.
DEFAULT_SIGNALS = ("env", "--default-signal=HUP,INT,QUIT")
BASH = (*DEFAULT_SIGNALS, "bash")

PASCAL = (sys.executable, "-m", "pascal_sglang.launch_server")
STOCK = (sys.executable, "-m", "sglang.launch_server")

TINY_FLAGS = (
    "--device cpu --reasoning-parser qwen3 --max-total-tokens 8192 --max-running-requests 64 "
    "--enable-custom-logit-processor --enable-metrics --log-level warning --random-seed 1"
).split()


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything that would activate or tune pascal_sglang."""
    env = of_this_process({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    env.pop("PYTHONPATH", None)
    return {**env, **(extra or {})}


class Fork:
    """A server that `warm_servers` started; what of `subprocess.Popen` is used here."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid = pid
        self._code = code

    def poll(self) -> int | None:
        try:
            return int(self._code.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, how: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)


# A socket of `warm_servers`: that of all workers of a run, or one that is kept between runs.
WARM_ENV = "TEST_WARM_SERVERS"


@functools.cache
def warm_servers() -> str:
    """The socket of the process that forks servers; it ends with this one unless it was given.

    Its environment is that of a server with a policy: SGLang reads some of it on import.
    """
    if kept := os.environ.get(WARM_ENV):
        return kept
    path = os.path.join(tempfile.mkdtemp(prefix="warm-"), "socket")
    env = {"SGLANG_PLATFORM": "pascal_cpu"}
    warm = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_servers.py")), path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(env),
    )
    _kept.append(warm)
    assert warm.stdout is not None
    if warm.stdout.readline() != b"ready\n":
        raise RuntimeError("the process that forks servers did not start")
    return path


_kept: list[subprocess.Popen[bytes]] = []


def begin_imports() -> None:
    """Let `warm_servers` import what it needs before anybody waits for a fork."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(warm_servers())


def fork(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    warm: str | None = None,
) -> Fork:
    """`command` as a fork of `warm_servers`, with the whole environment `env`. warm: the socket of
    another process of that kind, as on another host."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_TIMEOUT_S)  # The first one waits for its imports.
        connection.connect(warm or warm_servers())
        with connection.makefile("rw") as pipe:
            asked = [list(command), dict(env), str(cwd), str(log)]
            print(json.dumps(asked), file=pipe, flush=True)
            if not (pid := pipe.readline()):
                raise RuntimeError("the process that forks servers has ended")
            return Fork(int(pid), Path(f"{log}.code"))


def forked_environment() -> dict[str, str]:
    """For a command of `evals`: the servers that it starts are forks of `warm_servers`."""
    root = Path(__file__).parents[1]
    return {WARM_ENV: warm_servers(), "PYTHONPATH": f"{root / 'tests' / 'forks'}:{root}"}


class Server(LocalServer):
    """A server for tests.

    warm: as a fork of `warm_servers`, for servers with a policy; otherwise as a shell starts it.
    headers: what `get` sends along.
    """

    def __init__(
        self,
        command: Sequence[str],
        flags: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        *,
        warm: bool = False,
    ) -> None:
        super().__init__("server", port=ports.free_port())
        self.headers: dict[str, str] = {}
        whole = [*command, *flags, *self.address]
        self.process: Fork | subprocess.Popen[bytes]
        if warm:
            self.process = fork(whole, environment(env), cwd or Path.cwd(), self.log)
        else:
            with self.log.open("ab") as output:
                self.process = subprocess.Popen(
                    whole,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment(env),
                    cwd=cwd,
                    start_new_session=True,
                )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tree(self) -> list[psutil.Process]:
        """Every process seen under this server that still lives."""
        try:
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [
            p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]

    def wait_ready(self, timeout_s: float | None = None) -> None:
        super().wait_ready(timeout_s)
        if not any(self._listens(process) for process in self.tree()):
            raise ArmError(f"another process listens at {self.base_url}: {self._last_words()}")

    def _listens(self, process: psutil.Process) -> bool:
        """Another server may have taken the port before this one, which ends only then."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == self.port:
                    return True
        return False

    def _last_words(self) -> str:
        return f"\n{self.output[-4000:]}"

    def stop(self, how: int = signal.SIGINT) -> None:
        """Ask the server to end and insist that nothing of it stays behind.

        SGLang looks for a SIGTERM every five seconds only."""
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(STOP_TIMEOUT_S)
            left = self.wait_gone()
        finally:
            self.kill()
        assert not left, f"left behind: {left}\n{self.output[-2000:]}"

    def wait_gone(self) -> list[psutil.Process]:
        """Processes of this server that outlive it by more than a minute."""
        _, left = psutil.wait_procs(self.tree(), timeout=60)
        return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(STOP_TIMEOUT_S)

    def get(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.base_url}{path}", headers=self.headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            body = reply.read().decode()
        return json.loads(body) if reply.headers.get_content_subtype() == "json" else body

    def post(self, path: str, body: Any, timeout: float = 120) -> Any:
        request = urllib.request.Request(
            f"{self.base_url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read() or b"null")

    def put(self, path: str, body: Any, timeout: float = 60) -> Any:
        """body: JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base_url}{path}", data, self.headers, method="PUT")
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read())

    def stream(self, path: str, body: Any, timeout: float = 120) -> list[Any]:
        """All server-sent events of one streamed request, decoded."""
        request = urllib.request.Request(
            f"{self.base_url}{path}",
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        events = []
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            for line in reply:
                text = line.decode().strip()
                if text.startswith("data: ") and text != "data: [DONE]":
                    events.append(json.loads(text[6:]))
        return events

    def instances(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = self.get("/pascal/status")["instances"]
        return instances

    def recent(self, rid: str) -> dict[str, Any]:
        """The status entry of a request that ended; waits, as a reply may overtake the status."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for instance in self.instances():
                for request in instance.get("recent", ()):
                    if request["rid"] == rid:
                        return {**request, "dp_rank": instance["dp_rank"]}
            time.sleep(0.05)
        raise AssertionError(f"{rid} never showed up in /pascal/status")
