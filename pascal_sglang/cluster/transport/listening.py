"""Listening sockets that a library opens for every address of the host, kept to one of them and to
the hosts that are admitted.

The Mooncake Transfer Engine binds to all interfaces, and asks nobody for a name or a key. A socket
filter, which needs no privilege, makes the kernel drop a packet for another address, or from a host
that is not admitted, before there is a connection.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from typing import Any

import psutil

# Linux, asm-generic/socket.h; Python has no name for it.
SO_ATTACH_FILTER = 26
# Classic BPF, linux/filter.h; a packet's network header begins at the offset `_IP`.
_IP = 0xFFF00000
_LOAD_BYTE, _LOAD_WORD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
# Hosts that a filter takes: the kernel has a limit for its memory.
MOST_HOSTS = 512
# States of a connection that a peer has opened and can still use.
_OPEN = (psutil.CONN_SYN_RECV, psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)

Listening = tuple[str, int]


def own_address(listen: str) -> str:
    """The IPv4 address of this host that `listen` names: itself, or the only one of an interface or
    of a network like 10.0.0.0/24, so that one value names another address on every host.

    Raises: ValueError, one line, if this host has no such address, or several.
    """
    addresses = {
        interface: [found.address for found in addresses if found.family == socket.AF_INET]
        for interface, addresses in psutil.net_if_addrs().items()
    }
    if "/" in listen:
        network = ipaddress.IPv4Network(listen)
        everywhere = {address for found in addresses.values() for address in found}
        found = [a for a in everywhere if ipaddress.IPv4Address(a) in network]
        return _only(found, "in that network")
    if listen in addresses:
        return _only(addresses[listen], "on that interface")
    try:
        address = str(ipaddress.IPv4Address(listen))
    except ValueError:
        raise ValueError("this host has no such interface") from None
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ValueError(error.strerror) from None
    return address


def _only(found: list[str], where: str) -> str:
    if len(found) == 1:
        return found[0]
    several = f"several IPv4 addresses {where}: {', '.join(sorted(found))}"
    raise ValueError(f"this host has {several if found else f'no IPv4 address {where}'}")


def source_towards(host: str) -> str:
    """The address from which this host's connections to `host` come. Raises: OSError without a way
    there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # Nothing is sent.
        probe.connect((host, 9))
        found: str = probe.getsockname()[0]
        return found


def listening() -> frozenset[Listening]:
    """Addresses and ports at which this process listens."""
    return frozenset(found for _, found in _listening())


class Gate:
    """The sockets that this process has begun to listen with after `before`: they hear one address
    alone, and of peers the hosts that are admitted, at first `address` itself.

    Raises: OSError if the kernel takes no filter, or if somebody else connected first.
    """

    def __init__(self, address: str, before: Set[Listening]) -> None:
        self.address = address
        self.hosts: frozenset[str] = frozenset([address])
        self._sockets = [_duplicate(fd) for fd, found in _listening() if found not in before]
        self.ports: list[int] = sorted({one.getsockname()[1] for one in self._sockets})
        self._attach()
        for seen in psutil.net_connections("tcp"):
            mine = seen.pid in (None, os.getpid())  # One not yet accepted has no process.
            if not (mine and seen.status in _OPEN and seen.laddr.port in self.ports):
                continue
            for host in (_host(seen.laddr), _host(seen.raddr)):
                if host != address:
                    raise OSError(f"a connection of {host} came before it could be refused")

    def admit(self, hosts: Iterable[str]) -> None:
        """From now on hear these hosts, and `address`. What is connected stays so until `abort`.

        Raises: OSError if the kernel takes no such filter; what was heard before is heard then.
        """
        before, self.hosts = self.hosts, frozenset([self.address, *hosts])
        if self.hosts == before:
            return
        try:
            if len(self.hosts) > MOST_HOSTS:
                raise OSError(f"more than {MOST_HOSTS} hosts")
            self._attach()
        except OSError:
            self.hosts = before
            raise

    def abort(self, host: str) -> int:
        """End what `host` has connected to these sockets, at once: what it has sent and nobody has
        read is dropped, and what it still sends is refused. Returns: how many there were."""
        return _abort(lambda seen: seen.laddr.port in self.ports and _host(seen.raddr) == host)

    def _attach(self) -> None:
        steps = [struct.pack("=HBBI", *step) for step in _program(self.address, self.hosts)]
        memory = ctypes.create_string_buffer(b"".join(steps))
        # struct sock_fprog: the number of steps, and where they are. It replaces one before.
        what = struct.pack("@HP", len(steps), ctypes.addressof(memory))
        for one in self._sockets:
            one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, what)

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def abort_connections(host: str, ports: Iterable[int]) -> int:
    """End this process's connections to a peer at once, and those that are being made: what is
    unsent is dropped, and nothing of it is sent again later, as it would be after a close. Returns:
    how many there were."""
    wanted = frozenset(ports)
    return _abort(lambda seen: _host(seen.raddr) == host and seen.raddr.port in wanted)


def _abort(wanted: Callable[[Any], bool]) -> int:
    count = 0
    for seen in psutil.Process().net_connections("tcp"):
        if not seen.raddr or seen.status == psutil.CONN_LISTEN or not wanted(seen):
            continue
        # The library may have closed it meanwhile, and opened another one under its number. One
        # that is being made has no peer's name yet, and has its own.
        with suppress(OSError), _duplicate(seen.fd) as one:
            if one.getsockname()[:2] == seen.laddr:
                _disconnect(one)
                count += 1
    return count


def _host(address: Any) -> str:
    found: str = address.ip
    return found.removeprefix("::ffff:")


def _duplicate(fd: int) -> socket.socket:
    """A socket of this process under another number. Raises: OSError if it is none, or gone."""
    number = os.dup(fd)
    try:
        return socket.socket(fileno=number)
    except OSError:
        os.close(number)
        raise


def _disconnect(one: socket.socket) -> None:
    # connect(2): an address of AF_UNSPEC dissolves the association, which resets the connection.
    nowhere = ctypes.create_string_buffer(16)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(one.fileno(), nowhere, len(nowhere)):
        # Another thread waits inside of it.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)


def _listening() -> list[tuple[int, Listening]]:
    return [
        (seen.fd, (seen.laddr.ip, seen.laddr.port))
        for seen in psutil.Process().net_connections("tcp")
        if seen.status == psutil.CONN_LISTEN
    ]


def _program(address: str, hosts: Set[str]) -> Iterator[tuple[int, int, int, int]]:
    """Pass IPv4 packets of `hosts` for `address`: operation, steps to skip if true, if false,
    operand."""
    yield (_LOAD_BYTE, 0, 0, _IP)
    yield (_AND, 0, 0, 0xF0)
    yield (_JUMP_IF_EQUAL, 1, 0, 0x40)
    yield (_RETURN, 0, 0, 0)
    yield (_LOAD_WORD, 0, 0, _IP + 16)
    yield (_JUMP_IF_EQUAL, 1, 0, int(ipaddress.IPv4Address(address)))
    yield (_RETURN, 0, 0, 0)
    yield (_LOAD_WORD, 0, 0, _IP + 12)
    for host in sorted(hosts):
        yield (_JUMP_IF_EQUAL, 0, 1, int(ipaddress.IPv4Address(host)))
        yield (_RETURN, 0, 0, 0xFFFFFFFF)
    yield (_RETURN, 0, 0, 0)
