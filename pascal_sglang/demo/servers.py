"""Demo servers as forks of one process: SGLang is imported once, not by every process of each.

    python -m pascal_sglang.demo.servers [FLAGS] --log FILE [FLAGS] [--log FILE [FLAGS]] ...

Each `--log` begins a server, whose messages go to that file; flags before the first are for all of
them. When one ends, by itself or by a signal to this process, so do the others, and the exit code
is the first one's. For a CPU alone: what an accelerator's driver holds does not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import psutil

from pascal_sglang import launch_server
from pascal_sglang.config import CONFIG_ENV, ConfigError, LaunchError, from_flags
from pascal_sglang.entrypoints.preflight import check_machine

LOG = "--log"
ENDINGS = {signal.SIGINT, signal.SIGTERM}
STOP_TIMEOUT_S = 15
# What the processes of a server import.
IMPORTS = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    # It has the platform put its kernels in their places, which models bind.
    "sglang.srt.model_executor.model_runner",
    # All models: a scheduler imports them before it loads one.
    "sglang.srt.models.registry",
    "sglang.srt.constrained.xgrammar_backend",
)


def preload() -> None:
    """Import what forks of this process would."""
    # On a CPU, SGLang's imports warn about every quantisation kernel that is not there.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"sglang\.")
    for name in IMPORTS:
        importlib.import_module(name)


def freeze() -> None:
    """No fork looks for garbage in what all of them have, and so copies it."""
    gc.collect()
    gc.freeze()


def fork_workers() -> None:
    """From now on this process's workers are forks of it. SGLang asks for others."""
    ours: Any = multiprocessing
    ours.set_start_method("fork", force=True)
    ours.set_start_method = lambda *_, **__: None


def split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Log and flags of each server. Raises: LaunchError."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == LOG:
            parts.append([])
        else:
            parts[-1].append(word)
    common, *servers = parts
    if not servers or not all(servers):
        raise LaunchError(f"{LOG} wants the file of a server's messages")
    return [(log, ["--demo", *common, *flags]) for log, *flags in servers]


def start(log: str, flags: Sequence[str]) -> int:
    """The process id of a server. Signals to end are blocked meanwhile."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _serve(log, flags)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        # Not into what the forked process had been about to do.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(log: str, flags: Sequence[str]) -> int:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    random.seed()  # SGLang draws ports, which would be every fork's.
    fork_workers()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    return launch_server.main(flags)


def serve_all(servers: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Run them until one ends; its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logs = {start(log, flags): log for log, flags in servers}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        print(f"{launch_server.PROG}: the server of {logs.pop(ended)} has ended", file=sys.stderr)
        return 128 - code if code < 0 else code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        stop([psutil.Process(pid) for pid in logs])


def stop(servers: Sequence[psutil.Process]) -> None:
    """Workers of one that has to be killed notice that it is gone."""
    for server in servers:
        server.send_signal(signal.SIGINT)
    _, deaf = psutil.wait_procs(servers, STOP_TIMEOUT_S)
    for server in deaf:
        server.kill()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        servers = split(sys.argv[1:] if argv is None else argv)
        configs = [from_flags(launch_server.parse(flags)[0]) for _, flags in servers]
    except (LaunchError, ConfigError) as error:
        print(f"{launch_server.PROG}: error: {error}", file=sys.stderr)
        return launch_server.EXIT_BAD_INPUT
    # The plugin wants a configuration; each fork has its own.
    os.environ[CONFIG_ENV] = configs[0].to_json()
    check_machine(["--device", "cpu"])
    preload()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    freeze()
    return serve_all(servers)


if __name__ == "__main__":
    sys.exit(main())
