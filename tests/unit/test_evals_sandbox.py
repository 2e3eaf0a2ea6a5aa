"""Programs that behave, and programs that try what they must not."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from evals.grading import confine, sandbox
from evals.grading.sandbox import Limits, SandboxError, run


@pytest.fixture(scope="module")
def isolation():
    return sandbox.check()


def test_a_program_runs_to_its_end_in_its_own_folder():
    seen = run(
        "import os, sys\n"
        "open('own.txt', 'w').write('kept')\n"
        "print(open('own.txt').read(), sorted(os.listdir()), sys.argv, __name__)\n"
    )
    assert seen.status == 0
    assert seen.output == "kept ['own.txt', 'program.py'] ['program.py'] __main__\n"


def test_a_wrong_answer_says_why():
    seen = run("assert 1 + 1 == 3, 'sums'")
    assert seen.status == 1
    assert "AssertionError: sums" in seen.output
    assert run("raise SystemExit(7)").status == 7
    assert "EOFError" in run("input()").output


def test_an_infinite_loop_is_ended_by_its_cpu_time():
    seen = run("while True: pass", Limits(cpu_s=1, wall_s=60))
    assert seen.status == 128 + signal.SIGXCPU


def test_waiting_is_ended_by_the_clock():
    assert run("import time; time.sleep(600)", Limits(wall_s=1)).status is None


def test_nothing_outlives_a_program(isolation):
    if not isolation.namespaces:
        pytest.skip("the kernel grants no process namespace here")
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('gone')\n"
    )
    before = set(programs())
    seen = run(program, Limits(wall_s=60))
    assert (seen.status, seen.output) == (0, "gone\n")
    _, left = psutil.wait_procs(set(programs()) - before, timeout=10)
    assert left == []


def programs():
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[-1] == confine.PROGRAM:
            yield process


def test_a_memory_bomb_hits_its_limit():
    seen = run("held = []\nwhile True: held.append(bytearray(1 << 20))")
    assert seen.status == 1
    assert "MemoryError" in seen.output


def test_a_fork_bomb_is_bounded():
    program = (
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    while made < 1000:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(600)\n"
        "        made += 1\n"
        "except BlockingIOError:\n"
        "    print('refused after', made)\n"
    )
    seen = run(program, Limits(processes=5))
    assert seen.output.startswith("refused after ")
    assert int(seen.output.split()[-1]) < 5


def test_it_writes_nowhere_else(isolation):
    if not isolation.read_only and os.geteuid() != 0:
        pytest.skip("without namespaces a program may write what its user may write")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        # Open to everybody where only the read-only file system can keep it out.
        Path(folder).chmod(0o777 if isolation.read_only else 0o755)
        target = Path(folder, "escaped")
        seen = run(f"open({str(target)!r}, 'w').write('out')")
        assert seen.status == 1
        assert not target.exists()


def test_a_file_has_a_limit():
    seen = run("open('big', 'wb').write(bytes(2 << 20))", Limits(file_bytes=1 << 20))
    assert seen.status != 0


def test_it_sees_nothing_of_our_environment(isolation, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    assert "A_SECRET" not in run("import os; print(dict(os.environ))").output
    if not isolation.read_only and os.geteuid() != 0:
        pytest.skip("without namespaces /proc tells a user of all processes of that user")
    program = (
        "import glob\n"
        "for path in glob.glob('/proc/*/environ'):\n"
        "    try:\n"
        "        print(open(path).read())\n"
        "    except OSError:\n"
        "        continue\n"
        "print('looked')\n"
    )
    seen = run(program, Limits(output_bytes=1 << 22))
    assert seen.output.endswith("looked\n")
    assert "s3cret" not in seen.output


def test_it_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        port = listening.getsockname()[1]
        seen = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        assert seen.status == 1
        assert "Error" in seen.output
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize("attempt", ["socket.socket()", "os.system('true')"])
def test_where_there_are_no_namespaces_a_hook_refuses_sockets(attempt, tmp_path):
    (tmp_path / confine.PROGRAM).write_text(f"import os, socket\nprint('here')\n{attempt}\n")
    seen = subprocess.run(
        [sys.executable, "-I", "-c", confine.NO_SOCKETS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (seen.returncode, seen.stdout) == (1, "here\n")
    assert "PermissionError" in seen.stderr


def test_huge_output_is_cut():
    few = Limits(cpu_s=1, wall_s=60, output_bytes=1000)
    assert run("print('y' * 10_000_000)", few).output == "y" * 1000
    endless = run("while True: print('x' * 1000)", few)
    assert len(endless.output) == 1000
    assert endless.status == 128 + signal.SIGXCPU


def test_where_nothing_can_run_one_line_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "interpreter", lambda: "/no/such/python")
    with pytest.raises(SandboxError, match=r"no program can be run in the sandbox: .*No such file"):
        sandbox.check()
