"""Every way into the processes of a server, and who finds it open: the table of docs/security.md.

A socket, an open file or a piece of shared memory that no row describes is an error, and so is one
that somebody can use who should not.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.harness import Fork, Server, warm_servers
from tests.strangers import NOBODY, NoOtherHost, another_host, attempts

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Door:
    """A row: its name in the docs, whose it is, by the name of the process, and what it looks like.
    user: whether another user of this host can open it; None where nothing is to be had there."""

    name: str
    process: str
    looks: str
    user: bool | None = False


TEMPORARY = re.escape(tempfile.gettempdir())
TABLE = (
    Door("HTTP", ".*", r"tcp 127\.0\.0\.1:HTTP", user=True),
    # As the status shows them; the ports of ranks look the same.
    Door("Control messages over TCP", ".*", r"tcp 127\.0\.0\.1:(CONTROL)", user=True),
    Door("Ranks of an instance", "scheduler", r"tcp 127\.0\.0\.1:\d+", user=True),
    Door("Mooncake", "scheduler", r"tcp (0\.0\.0\.0|::):1\d{4}", user=True),
    Door("Mooncake's journal", "scheduler", r"datagram @[0-9a-f]{5}", user=None),
    Door("Control messages", ".*", rf"unix {TEMPORARY}/pascal-[^/]+/(controller|http|\d+)"),
    Door("Controller's status", ".*", rf"file {TEMPORARY}/pascal-[^/]+/controller\.json"),
    Door("Folder's lock", ".*", rf"file {TEMPORARY}/pascal-[^/]+/pascal_sglang\.lock"),
    Door("SGLang's messages", ".*", rf"unix {TEMPORARY}/tmp[^/]+"),
    Door("KV receive buffer", "scheduler", r"memory /memfd:pascal-kv-receive-.*"),
    Door("Load snapshots", ".*", r"memory /dev/shm/sglang_loads_[^/]+\.shm"),
    Door("Semaphores", ".*", r"memory /dev/shm/sem\.[^/]+"),
    Door("Broadcasts between ranks", "scheduler", r"memory /dev/shm/(psm|sgl_shm_mq)_[^/]+"),
    Door("Anonymous memory", "scheduler", r"file /dev/zero \(deleted\)"),
    Door("Metrics", ".*", rf"file {TEMPORARY}/tmp[^/]+/(counter|gauge|histogram|summary)_.*\.db"),
    Door("Caches", ".*", r"file .*/\.cache/.*", user=None),
)


@dataclass(frozen=True)
class Found:
    """Something of a process that others might open. how: an attempt of `strangers.attempts`, or
    None if there is no way to begin one."""

    process: str
    what: str
    how: tuple[object, ...] | None

    def row(self, http: int, control: str) -> Door | None:
        """http, control: ports, the latter as alternatives."""
        # A fork of `warm_servers` may have no title of its own.
        titled = "warm_servers" not in self.process
        rows = (d for d in TABLE if not titled or re.search(d.process, self.process))
        ports = {"HTTP": str(http), "CONTROL": control}
        return next(
            (
                door
                for door in rows
                if re.fullmatch(
                    re.sub("HTTP|CONTROL", lambda m: ports[m[0]], door.looks), self.what
                )
            ),
            None,
        )


def check(server: Server) -> set[str]:
    """Look at every process of a server that listens on 127.0.0.1; the names of rows seen."""
    tests = {str(server.log), warm_servers() if isinstance(server.process, Fork) else ""}
    found = sorted(
        {f for p in server.tree() for f in _of(p) if f.what.partition(" ")[2] not in tests},
        key=lambda f: (f.what, f.process),
    )
    control = _control_ports(server)
    rows = [f.row(server.port, control) for f in found]
    unknown = [f for f, row in zip(found, rows, strict=True) if row is None]
    assert unknown == [], f"not in the table of docs/security.md: {unknown}"
    known = [(f, row) for f, row in zip(found, rows, strict=True) if row is not None]

    tried = [(f.how, row) for f, row in known if f.how is not None and row.user is not None]
    assert all(error is None for error in attempts([how for how, _ in tried])), "we can, ourselves"
    if not os.geteuid():
        outcome = attempts([how for how, _ in tried], user=NOBODY)
        for (how, row), error in zip(tried, outcome, strict=True):
            assert (error is None) == row.user, f"{row.name}, {how}: {error}"
        ports = [how[2] for how, _ in tried if how[0] == "tcp"]
        try:
            with another_host() as (there, ours):
                assert None not in attempts([("tcp", ours, port) for port in ports], there), ports
        except NoOtherHost as reason:
            warnings.warn(f"nothing was tried from another host: {reason}", stacklevel=2)
    return {row.name for _, row in known}


def _control_ports(server: Server) -> str:
    shown = server.get("/pascal/status").get("controller", {})
    ports = [at.rpartition(":")[2] for at in (shown.get("control_addresses") or {}).values()]
    return "|".join(ports) or "none"


def _of(process: psutil.Process) -> Iterator[Found]:
    name = " ".join(process.cmdline()) or process.name()
    for seen in process.net_connections("inet"):
        host, port = seen.laddr or ("", 0)
        if seen.status == psutil.CONN_LISTEN:
            reached = LOOPBACK if host in EVERYWHERE else host
            yield Found(name, f"tcp {host}:{port}", ("tcp", reached, port))
        elif seen.status == psutil.CONN_NONE:
            yield Found(name, f"udp {host}:{port}", None)
    bound = _bound_unix_sockets()
    for descriptor in _descriptors(process):
        try:
            target = os.readlink(descriptor)
            written = _is_written(descriptor)
        except FileNotFoundError:  # Closed meanwhile.
            continue
        if target.startswith("socket:"):
            for kind, path in bound.get(target[8:-1], ()):
                yield Found(name, f"{kind} {path}", ("unix", path) if kind == "unix" else None)
                if "/pascal-" in path:
                    status = str(Path(path).with_name("controller.json"))
                    yield Found(name, f"file {status}", ("open", status))
        elif written:
            yield _file(name, target, descriptor)
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        _, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions[1::2] == "ws" and path and path[0].startswith("/"):
            deleted = path[0].endswith(" (deleted)")
            yield _file(name, path[0], None if deleted else path[0])


def _file(process: str, path: str, opened: str | None) -> Found:
    kind = "memory" if path.startswith(("/dev/shm/", "/memfd:")) else "file"
    return Found(process, f"{kind} {path}", ("open", opened) if opened else None)


def _descriptors(process: psutil.Process) -> list[str]:
    return [f"/proc/{process.pid}/fd/{n}" for n in os.listdir(f"/proc/{process.pid}/fd")]


def _is_written(descriptor: str) -> bool:
    """Whether it is a file, and open for writing."""
    number = os.path.basename(descriptor)
    flags = Path(descriptor).parents[1].joinpath("fdinfo", number).read_text().split("\n")[1]
    access = int(flags.split()[1], 8) & os.O_ACCMODE
    return stat.S_ISREG(os.stat(descriptor).st_mode) and access != os.O_RDONLY


def _bound_unix_sockets() -> dict[str, list[tuple[str, str]]]:
    """By inode: Unix sockets with an address that take connections or datagrams."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, kind, _, inode, *path = line.split()
        datagram = int(kind, 16) == 2
        if path and (datagram or int(flags, 16) & 0x10000):  # __SO_ACCEPTCON
            found.setdefault(inode, []).append(("datagram" if datagram else "unix", path[0]))
    return found
