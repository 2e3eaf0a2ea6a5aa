"""The server's own folder for sockets and the status file, removed on every way out.

Its owner holds a lock in it for as long as it lives. A process that is killed removes nothing, so
whoever comes next looks for folders whose lock is free: the launching process when it ends, and
every later start.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "pascal-"
LOCK = "pascal_sglang.lock"
# What `tempfile.mkdtemp` makes of the prefix.
_NAME = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")
# As long as the address of a socket below the temporary folder gets (`post.CONTROLLER`).
LONGEST_NAME = f"{PREFIX}12345678/controller"


class PrivateFolder:
    """A folder in the temporary one, for this user alone. Raises: OSError."""

    def __init__(self, path: str | None = None) -> None:
        """path: of one that `reserve` has made; a new one otherwise."""
        self.path = path or tempfile.mkdtemp(prefix=PREFIX)
        # Renamed once it is held: a sweep must not find it free.
        fresh = os.path.join(self.path, f"{LOCK}.new")
        self._lock = open(fresh, "w")  # noqa: SIM115 - held for the life of the process.
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(fresh, os.path.join(self.path, LOCK))
        _own.append(self)

    def remove(self) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


# This process's folders.
_own: list[PrivateFolder] = []
# Those that it has made for another one.
_reserved: list[str] = []


def reserve() -> str:
    """The path of a new folder whose owner is yet to come; until then, no sweep removes it.
    Raises: OSError."""
    _reserved.append(tempfile.mkdtemp(prefix=PREFIX))
    return _reserved[-1]


# After `Engine.shutdown`, which SGLang registers later, and which kills the owners.
@atexit.register
def remove_all() -> None:
    """This process ends: remove its folders, and those of the processes that it has ended."""
    while _own:
        _own.pop().remove()
    while _reserved:
        shutil.rmtree(_reserved.pop(), ignore_errors=True)
    remove_ownerless()


def remove_ownerless() -> list[str]:
    """Remove this user's folders whose owner has died; their paths. Never raises OSError."""
    removed = []
    try:
        entries = [e for e in os.scandir(tempfile.gettempdir()) if _NAME.fullmatch(e.name)]
    except OSError:
        return []
    for entry in entries:
        try:
            if _is_ownerless(Path(entry.path)):
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(entry.path)
        except OSError:
            continue
    return removed


def _is_ownerless(folder: Path) -> bool:
    """Raises: OSError for what is no folder of ours."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    with open(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
