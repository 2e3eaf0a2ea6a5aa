"""Demo servers end together; bad flags end in one line before SGLang is imported."""

import signal
import subprocess
import sys
import time

import pytest

from pascal_sglang.config import LaunchError
from pascal_sglang.demo import servers
from tests.harness import DEFAULT_SIGNALS

TIMEOUT_S = 60
# Two servers: one runs until it is told to end, the other does what the test says.
RUN = """
import sys, time
from pascal_sglang.demo import servers
from tests.harness import DEFAULT_SIGNALS

def serve(flags):
    if flags == ["first"]:
        {first}
    try:
        print("serving", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        return 0

servers.launch_server.main = serve
logs = sys.argv[1:]
sys.exit(servers.serve_all([(logs[0], ["first"]), (logs[1], ["second"])]))
"""


def started(tmp_path, first):
    """The process that runs both servers, and their logs."""
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    process = subprocess.Popen(
        [*DEFAULT_SIGNALS, sys.executable, "-c", RUN.format(first=first), *map(str, logs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, logs


def test_each_log_begins_a_server():
    assert servers.split(["--port=1", "--log", "a", "--log", "b", "--port", "2"]) == [
        ("a", ["--demo", "--port=1"]),
        ("b", ["--demo", "--port=1", "--port", "2"]),
    ]


@pytest.mark.parametrize("flags", [[], ["--port", "1"], ["--log"], ["--log", "a", "--log"]])
def test_a_log_is_wanted(flags):
    with pytest.raises(LaunchError, match="--log"):
        servers.split(flags)


def test_bad_flags_are_one_line_and_exit_code_2(capsys):
    assert servers.main(["--log", "a", "--log", "b", "--pascal-policies", "fcfs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--pascal-policies" in line


@pytest.mark.parametrize(
    ("first", "code", "says"),
    [
        ("sys.exit('no such model')", 1, "no such model"),
        ("return 7", 7, ""),
        ("raise ValueError('odd')", 1, "ValueError: odd"),
    ],
)
def test_when_one_ends_so_do_the_others(tmp_path, first, code, says):
    process, logs = started(tmp_path, first)
    with process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert says in logs[0].read_text()
    assert said.splitlines() == [f"pascal_sglang: the server of {logs[0]} has ended"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(tmp_path, number):
    process, logs = started(tmp_path, "pass")
    with process:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(log.exists() and log.read_text() for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, said) == (128 + signal.SIGINT, "")
    assert [log.read_text() for log in logs] == ["serving\n", "serving\n"]
