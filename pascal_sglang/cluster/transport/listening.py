"""Listening sockets that a library opens for every address of the host, kept to one of them.

The Mooncake Transfer Engine binds to all interfaces and has no option for it. A socket filter,
which needs no privilege, makes the kernel drop a packet for any other address before there is a
connection, as if the socket were bound to that one.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Set

import psutil

# Linux, asm-generic/socket.h; Python has no name for it.
SO_ATTACH_FILTER = 26
# Classic BPF, linux/filter.h; a packet's network header begins at the offset `_IP`.
_IP = 0xFFF00000
_LOAD_BYTE, _LOAD_WORD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
# States of a connection that a peer has opened and can still use.
_OPEN = (psutil.CONN_SYN_RECV, psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)

Listening = tuple[str, int]


def listening() -> frozenset[Listening]:
    """Addresses and ports at which this process listens."""
    return frozenset(found for _, found in _listening())


def keep_to(address: str, before: Set[Listening]) -> list[int]:
    """Let the sockets that began to listen after `before` hear one IPv4 address alone.

    Returns: their ports, sorted. Raises: OSError if the kernel takes no filter, or if somebody
    connected to another address first.
    """
    ports = set()
    for fd, found in _listening():
        if found not in before:
            with socket.socket(fileno=os.dup(fd)) as one:
                _attach(one, address)
            ports.add(found[1])
    for seen in psutil.net_connections("tcp"):
        host = seen.laddr.ip.removeprefix("::ffff:") if seen.laddr else address
        mine = seen.pid in (None, os.getpid())  # A connection not yet accepted has no process.
        if mine and seen.status in _OPEN and seen.laddr.port in ports and host != address:
            raise OSError(f"a connection to {host} came before it could be refused")
    return sorted(ports)


def _listening() -> list[tuple[int, Listening]]:
    return [
        (seen.fd, (seen.laddr.ip, seen.laddr.port))
        for seen in psutil.Process().net_connections("tcp")
        if seen.status == psutil.CONN_LISTEN
    ]


def _attach(listener: socket.socket, address: str) -> None:
    program = [struct.pack("=HBBI", *step) for step in _program(address)]
    memory = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: the number of steps, and where they are.
    what = struct.pack("@HP", len(program), ctypes.addressof(memory))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, what)


def _program(address: str) -> list[tuple[int, int, int, int]]:
    """Pass IPv4 packets for `address`: operation, steps to skip if true, if false, operand."""
    return [
        (_LOAD_BYTE, 0, 0, _IP),
        (_AND, 0, 0, 0xF0),
        (_JUMP_IF_EQUAL, 0, 3, 0x40),
        (_LOAD_WORD, 0, 0, _IP + 16),
        (_JUMP_IF_EQUAL, 0, 1, int(ipaddress.IPv4Address(address))),
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    ]
