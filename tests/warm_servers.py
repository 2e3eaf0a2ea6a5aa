"""Servers as forks of a process that has imported SGLang: what imports cost is paid once, not by
every process of every server.

    python tests/warm_servers.py SOCKET [keep]

Takes one JSON list `[command, environment, folder, log]` per connection to that Unix socket and
answers with the process id of a server that runs in a session of its own. Its exit code comes in
the file `log + ".code"`. Imports when it is asked for the first time. Ends with its standard input
unless told to `keep` serving. A fork imports everything of ours from its own folder, so one such
process serves while the code changes.

Worker processes are forks too. What SGLang reads from the environment on import is this process's:
a server that needs other settings there has to be started from a shell, and so has one that must
prove what a worker process imports by itself.
"""

import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import traceback
import types
from pathlib import Path


def serve(command, environment, folder, log):
    """In the fork: what `command` does in a shell. The exit code."""
    from pascal_sglang.demo.servers import fork_workers

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    # SGLang imports its platform, which is ours, and with it the package of another folder or day.
    for name in [name for name in sys.modules if name.partition(".")[0] == "pascal_sglang"]:
        del sys.modules[name]
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Forks would draw the same ports.
    random.seed()
    _draw_ports(environment.get("TEST_PORTS"))
    _share_what_plugins_look_for()
    fork_workers()
    try:
        _run(command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# What each process looks for when it loads its plugins, looked for once (`look_ahead`): the syntax
# of the files that our list of seams names, and where the functions of SGLang's are, by their id.
parse, bound, looked_at = None, {}, set()
DEFINED = (types.FunctionType, type)


def look_ahead():
    global parse
    from pascal_sglang import seams

    for seam in seams.load_seams():
        seams.installed().find(seam)
    parse = seams._parse
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "pascal_sglang":
            looked_at.add(name)
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if _of_sglang(value):
                    bound.setdefault(id(value), []).append((module, attribute, value))


def _of_sglang(value):
    """A function or class; others may warn when they are looked at."""
    of = getattr(value, "__module__", 0) if issubclass(type(value), DEFINED) else 0
    return isinstance(of, str) and of.startswith("sglang.")


def _share_what_plugins_look_for():
    from sglang.srt.plugins import hook_registry

    from pascal_sglang import seams

    seams._parse = parse
    scan = getattr(hook_registry, "_propagate_patch", None)
    if scan is None:  # An older release.
        return

    def propagate(original, wrapped, source):
        """As SGLang's, which looks at everything in all modules for each of our hooks."""
        if not _of_sglang(original) or original.__module__ not in looked_at:
            return scan(original, wrapped, source)
        places = bound.get(id(original), []) + [
            (module, attribute, value)
            for name, module in list(sys.modules.items())
            if name not in looked_at
            for attribute, value in list(getattr(module, "__dict__", {}).items())
            if value is original
        ]
        changed = []
        for module, attribute, _ in places:
            if module is not source and getattr(module, attribute, None) is original:
                setattr(module, attribute, wrapped)
                changed.append((module, attribute, wrapped))
        bound[id(wrapped)] = changed
        return len(changed)

    hook_registry._propagate_patch = propagate


def _draw_ports(ports):
    """Let SGLang draw from `FIRST-LAST`, a worker's own (`tests.ports`)."""
    from sglang.srt.utils import network

    draw = getattr(network, "get_free_port_below_ephemeral", None)
    if ports and draw is not None:  # Older releases have the system choose.
        draw.__defaults__ = (*map(int, ports.split("-")), *draw.__defaults__[2:])


def _run(command):
    """`python -m MODULE ...`, `python FILE ...` or `sglang ...`."""
    if Path(command[0]).name == "sglang":
        sys.argv[:] = command
        sys.exit(sys.modules["sglang.cli.main"].main())
    if command[1] == "-m":
        sys.argv[:] = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command[1:]
        runpy.run_path(command[1], run_name="__main__")


class Forks:
    """Starts servers and writes down how each ended."""

    def __init__(self):
        self.logs = {}

    def start(self, asked):
        process = os.fork()
        if not process:
            code = serve(*asked)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        self.logs[process] = asked[-1]
        return process

    def reap(self):
        while self.logs:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            if log := self.logs.pop(process, None):
                Path(f"{log}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def warm_up():
    import setproctitle

    from pascal_sglang.demo import servers

    # It looks for the place of titles once, and finds none in a fork with another environment.
    setproctitle.getproctitle()
    servers.preload()
    importlib.import_module("sglang.cli.main")
    look_ahead()
    servers.freeze()


def main(path, keep=False):
    # Not this folder, whose modules are named like others, but the one around it: the platform that
    # SGLang imports, which is ours, comes from there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        ready, _, _ = select.select([listener] if keep else [listener, sys.stdin], [], [])
        if listener not in ready:
            return
        warm_up()
        forks = Forks()
        # A child's end interrupts the wait below.
        waker, bell = socket.socketpair()
        bell.setblocking(False)
        signal.set_wakeup_fd(bell.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            watched = [listener, waker] if keep else [listener, waker, sys.stdin]
            ready, _, _ = select.select(watched, [], [])
            if waker in ready:
                waker.recv(4096)
                forks.reap()
            if listener in ready:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection, connection.makefile("rw") as pipe:
                    if asked := pipe.readline():  # Its client may have ended meanwhile.
                        print(forks.start(json.loads(asked)), file=pipe, flush=True)
            if sys.stdin in ready and not os.read(0, 1):
                return


if __name__ == "__main__":
    main(sys.argv[1], keep=sys.argv[2:] == ["keep"])
