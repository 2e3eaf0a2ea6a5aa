"""How much host memory this process may take: the machine's, or that of its control group.

A container's limit is in none of the figures of the machine. Both versions of control groups are
read (`cgroup-v1/memory.rst` and `cgroup-v2.rst` of Linux's `Documentation/admin-guide`), and every
group above this one, because each has a limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """free: bytes. limited: whether a control group leaves less than the machine has. total: bytes
    that are free when nothing is taken; the same for all processes of a group."""

    free: int
    limited: bool
    total: int

    def __str__(self) -> str:
        whose = "this process's control group" if self.limited else "this machine"
        return f"{self.free / 2**30:.1f} GiB that {whose} has free"


@dataclass(frozen=True, slots=True)
class Files:
    """Names of one version: limit, use, and the use that the kernel takes back at once."""

    limit: str
    used: str
    cached: str


VERSION_1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = Files("memory.max", "memory.current", "inactive_file")


def host_memory(proc: Path = PROC) -> HostMemory:
    memory = psutil.virtual_memory()
    machine: int = memory.available
    groups = [found for found in _groups(proc) if found is not None]
    least = min((free for _, free in groups), default=machine)
    total = min([memory.total, *(limit for limit, _ in groups)])
    return HostMemory(min(machine, least), least < machine, total)


def _groups(proc: Path) -> Iterator[tuple[int, int] | None]:
    """The limit of each group above the process, and the bytes that it leaves; None where there is
    no limit."""
    try:
        paths = dict(_paths((proc / "cgroup").read_text()))
        mounts = (proc / "mountinfo").read_text()
    except OSError:
        return
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            path, files = paths.get(""), VERSION_2
        elif kind == "cgroup" and "memory" in options.split(","):
            path, files = paths.get("memory"), VERSION_1
        else:
            continue
        if path is None:
            continue
        root, mounted = before.split(" ")[3:5]
        # Inside a container, the process's path may be seen from outside of what is mounted.
        inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
        group = Path(mounted, inside.lstrip("/"))
        for folder in (group, *group.parents):
            if folder.is_relative_to(mounted):
                yield _limit_and_free(folder, files)


def _paths(text: str) -> Iterator[tuple[str, str]]:
    """Path by controller; the unified hierarchy has no name."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _limit_and_free(folder: Path, files: Files) -> tuple[int, int] | None:
    try:
        limit = (folder / files.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / files.used).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in rows if name == files.cached), 0)
        return int(limit), max(0, int(limit) - used + cached)
    except (OSError, ValueError):
        return None
