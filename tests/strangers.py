"""Somebody who is not the server: another user of this host, or a host on a network of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

# A user without rights; the number that Linux maps unknown users to.
NOBODY = 65534
ATTEMPT_S = 0.3
_names = count()


class NoOtherHost(Exception):
    """Nobody can be on another host here; the text says why."""


_TRY = """
import json, os, socket, sys
from contextlib import ExitStack
wanted, timeout, user = json.load(sys.stdin)
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
def attempt(kind, *what):
    try:
        with ExitStack() as stack:
            if kind == "open":
                os.close(os.open(what[0], os.O_RDONLY))
            else:
                family = {"unix": socket.AF_UNIX, "tcp": socket.AF_INET, "tcp6": socket.AF_INET6}
                one = stack.enter_context(socket.socket(family[kind], socket.SOCK_STREAM))
                one.settimeout(timeout)
                one.connect(what[0] if kind == "unix" else tuple(what))
    except OSError as error:
        return "timed out" if isinstance(error, TimeoutError) else os.strerror(error.errno)
    return None
json.dump([attempt(*one) for one in wanted], sys.stdout)
"""


def attempts(
    wanted: Sequence[tuple[Any, ...]], prefix: tuple[str, ...] = (), user: int | None = None
) -> list[str | None]:
    """What happens to each of `("open", path)`, `("unix", path)`, `("tcp" or "tcp6", host, port)`:
    an error's text, or None if it succeeds. prefix: what runs them elsewhere (`another_host`).
    user: who does it, `NOBODY` for somebody without rights; skips the test unless we are root."""
    if user is not None and os.geteuid():
        pytest.skip("only root can become another user")
    done = subprocess.run(
        [*prefix, sys.executable, "-S", "-c", _TRY],
        input=json.dumps([wanted, ATTEMPT_S, user]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout)
    return found


@contextmanager
def another_host() -> Iterator[tuple[tuple[str, ...], str]]:
    """A network of two: the prefix that runs a command on the other side, and our address there.
    Raises: `NoOtherHost` where that cannot be had."""
    if os.geteuid():
        raise NoOtherHost("only root can make a network namespace")
    number = next(_names)
    name = f"pascal{os.getpid()}n{number}"
    ours, theirs = f"psc{os.getpid() % 10**7}a{number}", f"psc{os.getpid() % 10**7}b{number}"
    subnet = f"198.18.{os.getpid() % 256}"  # RFC 2544: for tests of networks.

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoOtherHost(f"no network namespaces: {getattr(error, 'stderr', error)}") from error
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        ip("address", "add", f"{subnet}.{2 * number + 1}/31", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "address", "add", f"{subnet}.{2 * number}/31", "dev", theirs)
        ip("-n", name, "link", "set", theirs, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield ("ip", "netns", "exec", name), f"{subnet}.{2 * number + 1}"
    finally:
        subprocess.run(["ip", "link", "delete", ours], check=False, capture_output=True, timeout=30)
        subprocess.run(
            ["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30
        )
