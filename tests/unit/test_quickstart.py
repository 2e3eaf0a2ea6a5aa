"""launch/quickstart.sh, with a server and chats that cost nothing, leaves nothing behind; nor does
evals/gpu/check.sh, with a check that does nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from evals.load.server import SUPERVISE
from tests.harness import BASH

LAUNCH = Path(__file__).parents[2] / "launch"
TIMEOUT_S = 60
# For longer than any wait.
LONG_S = 600
# Stands for the servers: as they do, this ends by SIGINT, and its child is in its process group.
SERVER = """
import os, signal, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(os.environ["PIDS"], "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
try:
    child.wait()
except KeyboardInterrupt:
    sys.exit(0)
"""
# Waits until the servers are there, and then as long as the test says, or until there is a file.
CHAT = """
import os, time
from pathlib import Path
pids = Path(os.environ["PIDS"])
while not (pids.exists() and pids.read_text()):
    time.sleep(0.01)
print("chatting", flush=True)
ends = time.monotonic() + float(os.environ["CHAT_S"])
while time.monotonic() < ends and not Path(os.environ["OVER"]).exists():
    time.sleep(0.01)
"""
PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
"-m pascal_sglang.demo.servers" | "-m evals.gpu.check") exec {sys.executable} -c '{SERVER}' ;;
"-m "*) exit 0 ;;
"launch/demo_chat.py "*) exec {sys.executable} -c '{CHAT}' ;;
*) exec {sys.executable} "$@" ;;
esac
"""


class Run:
    """A run of a script with its output in a pipe."""

    def __init__(self, folder, chat_s, *arguments, script=LAUNCH / "quickstart.sh"):
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self._pids, self._over = folder / "pids", folder / "over"
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PASCAL_PYTHON": str(python),
            "PIDS": str(self._pids),
            "OVER": str(self._over),
            "CHAT_S": str(chat_s),
        }
        self.process = subprocess.Popen(
            [*BASH, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
            start_new_session=True,
        )

    def read_until(self, text):
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}")

    def end_chat(self):
        self._over.touch()

    def wait_until_started(self):
        deadline = time.monotonic() + TIMEOUT_S
        while not self._pids.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def assert_nothing_stays(self):
        """Also after a test that failed: nothing of it stays."""
        self.process.wait(TIMEOUT_S)
        assert_gone([int(pid) for pid in self._pids.read_text().split()])


def assert_gone(pids):
    """Soon, even if nobody reaps them. What is there all the same is killed."""
    deadline = time.monotonic() + TIMEOUT_S
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def _lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("number", "chat_s"),
    [
        (signal.SIGHUP, 0),
        (signal.SIGINT, 0),
        (signal.SIGKILL, 0),
        (signal.SIGTERM, LONG_S),
        (signal.SIGHUP, LONG_S),
    ],
)
def test_no_signal_leaves_the_server_behind(tmp_path, number, chat_s):
    """To the script alone, while it waits for the server and while it chats."""
    run = Run(tmp_path, chat_s)
    run.read_until("chatting" if chat_s else "Ctrl-C stops it")
    run.process.send_signal(number)
    run.assert_nothing_stays()
    killed = number == signal.SIGKILL
    assert run.process.returncode == (-number if killed else 128 + number)


def test_nor_does_a_reader_that_goes_first(tmp_path):
    """`quickstart.sh 2>&1 | tee log` and Ctrl-C: nobody reads what the script says at its end."""
    run = Run(tmp_path, 0)
    run.read_until("Ctrl-C stops it")
    run.process.stdout.close()
    run.process.send_signal(signal.SIGINT)
    run.assert_nothing_stays()


def test_nor_a_reader_of_a_few_lines(tmp_path):
    """`quickstart.sh 2>&1 | head -2`: the script ends with what it says next."""
    run = Run(tmp_path, LONG_S)
    run.read_until("chatting")
    run.process.stdout.close()
    run.end_chat()
    run.assert_nothing_stays()
    assert run.process.returncode == 128 + signal.SIGPIPE


def test_once_stops_after_the_chats(tmp_path):
    run = Run(tmp_path, 0, "--once")
    run.read_until("stopping the server")
    run.assert_nothing_stays()
    assert run.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_no_signal_leaves_the_gpu_check_behind(tmp_path, number):
    """To the script alone, which runs the check under `timeout`."""
    run = Run(tmp_path, 0, script=LAUNCH.parent / "evals" / "gpu" / "check.sh")
    run.wait_until_started()
    run.process.send_signal(number)
    run.assert_nothing_stays()


def supervise(*command, **more):
    return subprocess.Popen(
        [sys.executable, str(SUPERVISE), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_a_supervised_command_keeps_its_exit_code(command, code):
    with supervise("sh", "-c", command) as process:
        assert process.wait(TIMEOUT_S) == code


def test_one_that_will_not_stop_is_killed_with_its_group():
    deaf = "trap '' INT TERM; sleep 600 & echo $$ $!; while :; do sleep 1; done"
    process = supervise("--stop-timeout", "0.2", "sh", "-c", deaf)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGKILL
    assert_gone(pids)
    process.stdout.close()


def test_no_such_command_is_one_line(tmp_path):
    with supervise(str(tmp_path / "nothing"), stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 127
    assert said.count("\n") == 1
