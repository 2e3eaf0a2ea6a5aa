"""Runs a generated Python program locked down: little of everything, no network, nobody's rights.

The program gets a temporary folder of its own as its working directory, an empty environment, the
standard library, and the limits below. What holds it is in `evals.grading.confine`. It can still
*read* files: those that everybody may read where root runs it, else those of the user who does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from evals.grading.confine import PROGRAM

CONFINE = Path(__file__).with_name("confine.py")
PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3")
READ_BYTES = 1 << 16


class SandboxError(RuntimeError):
    """Programs cannot be run here; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """wall_s, cpu_s: seconds; a program beyond them is killed with all it started. memory_bytes:
    address space of each process. file_bytes: of one file, and of its whole folder where that is
    in memory. processes: at one time, threads included. output_bytes: what is kept of standard
    output and error together; the rest is thrown away."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    processes: int = 8
    output_bytes: int = 16 << 10


@dataclass(frozen=True, slots=True)
class Isolation:
    """namespaces: no network and no sight of other processes; without them sockets are refused by
    an audit hook only. read_only: it can write nowhere but in its folder; without it file
    permissions decide."""

    namespaces: bool
    read_only: bool

    def __str__(self) -> str:
        network = "no network" if self.namespaces else "sockets refused by an audit hook only"
        files = "files read-only" if self.read_only else "files guarded by permissions only"
        return f"{network}; {files}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """status: exit status, 128 + n after signal n, None when it ran out of wall-clock time.
    output: the beginning of standard output and error."""

    status: int | None
    output: str
    isolation: Isolation


def run(source: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end or to the end of its time. May be called from any thread. Raises
    SandboxError where it could not be locked down."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        # A lone surrogate, which a model may write, is no reason to fail here.
        Path(folder, PROGRAM).write_bytes(source.encode(errors="replace"))
        reader, writer = os.pipe()
        told = {
            "folder": folder,
            "python": interpreter(),
            "limits": dataclasses.asdict(limits),
            "report": writer,
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CONFINE), json.dumps(told)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={},
                cwd="/",
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        with open(reader, "rb") as report, process:
            assert process.stdout is not None
            try:
                output, ended = _read(process.stdout.fileno(), limits)
            finally:
                exited = _kill(process)
            said = report.read()
    text = output.decode(errors="replace")
    if not said:
        raise SandboxError(f"a program could not be locked down: {_last_line(text)}")
    code = process.returncode
    status = 128 - code if code < 0 else code
    return Outcome(status if ended or exited else None, text, Isolation(**json.loads(said)))


def check() -> Isolation:
    """What holds programs here. Raises SandboxError where none can be run."""
    seen = run("print('ready')", Limits(wall_s=60.0))
    if (seen.status, seen.output) != (0, "ready\n"):
        raise SandboxError(f"no program can be run in the sandbox: {_last_line(seen.output)}")
    return seen.isolation


def interpreter() -> str:
    """The Python that runs programs: ours, without its virtual environment. Root's programs run as
    another user, who may not be able to reach it; then the system's."""
    own = os.path.realpath(sys.executable)
    if os.geteuid() != 0:
        return own
    for path in (own, *PYTHONS):
        if _open_to_all(Path(path)):
            return path
    raise SandboxError(f"no Python that every user may run: not {', '.join((own, *PYTHONS))}")


def _open_to_all(path: Path) -> bool:
    try:
        whole = path.resolve(strict=True)
        return all(p.stat().st_mode & 0o001 for p in (whole, *whole.parents))
    except OSError:
        return False


def _read(descriptor: int, limits: Limits) -> tuple[bytes, bool]:
    """The output, cut, and whether it ended in time: every process of the program has it open."""
    deadline = time.monotonic() + limits.wall_s
    kept = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if selector.select(left_s):
                piece = os.read(descriptor, READ_BYTES)
                if not piece:
                    return bytes(kept), True
                kept += piece[: limits.output_bytes - len(kept)]
    return bytes(kept), False


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """End whatever is left of it; whether it had ended by itself. The group is killed before its
    leader is reaped, so that the number cannot have gone to somebody else."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ended is not None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:200]
