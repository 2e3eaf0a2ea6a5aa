"""Gives up every right a generated program can do without, then becomes that program.

A script of its own process, started by `evals.grading.sandbox`; standard library only.

    waiter        what `evals.grading.sandbox` started and kills
      first       first of its process namespace: when it goes, the kernel ends all in there
        program   what was asked for, with no privilege left

Namespaces need nothing but a kernel that grants user namespaces. Many containers do not; then
limits, file permissions and an audit hook against sockets remain. The hook keeps honest programs
off the network, not hostile ones. Root never runs a program: it becomes a user nobody is.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

PROGRAM = "program.py"
SETUP_FAILED = 125

# Tells of other processes; sockets of services, which no read-only file system closes.
HIDDEN = (b"/proc", b"/run")
# The range systemd keeps for users made up on the spot; each process gets its own.
FIRST_USER, USERS = 61184, 4336
# The waiter and the first process count towards the limit on processes, too.
OF_OURS = 2

# linux/sched.h, linux/prctl.h, linux/mount.h, linux/fcntl.h
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MS_RDONLY, MS_NOSUID_NODEV, MS_PRIVATE = 1, 1, 2 | 4, 1 << 18

NO_SOCKETS = f"""
import runpy, sys
def refuse(event, arguments):
    if event.startswith(
        ("socket.", "ctypes.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")
    ):
        raise PermissionError(event + " is not allowed here")
sys.addaudithook(refuse)
runpy.run_path({PROGRAM!r}, run_name="__main__")
"""

_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """The program's exit status, 128 + n after signal n."""
    told = json.loads(sys.argv[1])
    folder, limits, report = told["folder"], told["limits"], told["report"]
    os.set_inheritable(report, False)
    with open(os.path.join(folder, PROGRAM), "rb") as file:
        source = file.read()
    if os.geteuid() == 0:
        _stop_being_root(folder)
    alone = _enter_namespaces()
    read_only = alone and _only_writable(folder, limits["file_bytes"])
    if read_only:
        with open(os.path.join(folder, PROGRAM), "wb") as file:
            file.write(source)
    os.write(report, json.dumps({"namespaces": alone, "read_only": read_only}).encode())
    os.close(report)
    arguments = [PROGRAM] if alone else ["-c", NO_SOCKETS]
    command = [told["python"], "-I", *arguments]
    return _in_child(lambda: _in_child(lambda: _become(command, folder, limits)))


def _stop_being_root(folder: str) -> None:
    """Root is not bound by file permissions, nor by the limit on processes."""
    user = FIRST_USER + os.getpid() % USERS
    for path in (folder, os.path.join(folder, PROGRAM)):
        os.chown(path, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # After a change of user, /proc/self belongs to root, and the maps below could not be written.
    _libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def _enter_namespaces() -> bool:
    """No network, not even a loopback that is up, and no sight of other processes."""
    user, group = os.getuid(), os.getgid()
    try:
        _libc("unshare", CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)
    except OSError:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _only_writable(folder: str, size_bytes: int) -> bool:
    """Make every file read-only, hide what HIDDEN holds, and put an empty in-memory file system
    over `folder`. False where the kernel does not let us, or is older than 5.12."""
    everything = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, 0)
    arguments = (AT_FDCWD, b"/", AT_RECURSIVE, everything, ctypes.sizeof(everything))
    try:
        _libc("syscall", SYS_MOUNT_SETATTR, *arguments)
        for hidden in filter(os.path.isdir, HIDDEN):
            _libc("mount", b"none", hidden, b"tmpfs", MS_NOSUID_NODEV | MS_RDONLY, b"size=4k")
        options = f"mode=700,size={size_bytes}".encode()
        _libc("mount", b"none", os.fsencode(folder), b"tmpfs", MS_NOSUID_NODEV, options)
    except OSError:
        return False
    return True


def _in_child(run: Callable[[], int]) -> int:
    """Exit status of `run` in a child that does not outlive this process."""
    child = os.fork()
    if child == 0:
        try:
            _libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL.value, 0, 0, 0)
            os._exit(run())
        except BaseException:
            traceback.print_exc()
            os._exit(SETUP_FAILED)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(command: list[str], folder: str, limits: dict[str, Any]) -> int:
    os.chdir(folder)
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + OF_OURS, limits["processes"] + OF_OURS),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(limit, (soft, hard))
    # Nothing it starts can win rights back, set-user-id programs included.
    _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(command[0], command, {})


def _libc(name: str, *arguments: Any) -> None:
    """Numbers go as longs: what takes a variable number of arguments reads whole registers."""
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_LIBC, name)(*whole) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    os._exit(main())
