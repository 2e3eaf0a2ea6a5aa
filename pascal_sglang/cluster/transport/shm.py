"""KV through shared memory, for instances on one host.

A source writes into its target's receive buffer, which both have mapped: nothing lies in between.
The receive buffer is an anonymous shared memory file (`memfd_create`): peers of the same user, and
nobody else, open it by the process that holds it. It has no name that a killed process could leave
behind, and does not count against the few MiB that containers give to named segments.

Another host has other processes under the same ids, with files of their own. So the address says
what the file calls itself, too, and nothing else is opened.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress

from pascal_sglang.cluster.transport import Transport, TransportError, Write

_NAME = "pascal-kv-receive"
_ADDRESS = re.compile(r"(/proc/[0-9]+/fd/[0-9]+)#([0-9a-f]{16})")
# Receive buffers of peers that stay open.
PEERS = 1024


class SharedMemory(Transport):
    kind = "shm"
    direct = True

    def __init__(
        self,
        receive_buffer: int,
        pin: Callable[[memoryview], None],
        unpin: Callable[[memoryview], None],
    ) -> None:
        try:
            own = secrets.token_hex(8)
            self._file = os.memfd_create(f"{_NAME}-{own}")
            os.fchmod(self._file, 0o600)
            os.ftruncate(self._file, receive_buffer)
            self._memory = mmap.mmap(self._file, receive_buffer)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"cannot make {receive_buffer} bytes of shared memory: {error}"
            ) from error
        self.address = f"/proc/{os.getpid()}/fd/{self._file}#{own}"
        self.receive_buffer = memoryview(self._memory)
        self._peers: dict[str, memoryview] = {}
        self._pin, self._unpin = pin, unpin
        pin(self.receive_buffer)

    def open_peer(self, address: str) -> None:
        with suppress(TransportError):
            self._peer(address)

    def close_peer(self, address: str) -> None:
        found = self._peers.pop(address, None)
        if found is not None:
            self._unpin(found)

    def room(self, address: str, offset: int, size: int) -> Write:
        peer = self._peer(address)
        if offset < 0 or offset + size > len(peer):
            raise TransportError(
                f"{offset}+{size} is outside a receive buffer of {len(peer)} bytes"
            )
        return Write(peer[offset : offset + size])

    def _peer(self, address: str) -> memoryview:
        found = self._peers.get(address)
        if found is not None:
            return found
        parts = _ADDRESS.fullmatch(address)
        if not parts:
            raise TransportError("not the address of a receive buffer")
        if len(self._peers) >= PEERS:
            raise TransportError(f"more than {PEERS} receive buffers")
        try:
            if not os.readlink(parts[1]).startswith(f"/memfd:{_NAME}-{parts[2]} "):
                raise TransportError("a receive buffer that is not on this host")
            file = os.open(parts[1], os.O_RDWR)
            try:
                found = memoryview(mmap.mmap(file, os.fstat(file).st_size))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot open a peer's receive buffer: {error}") from error
        self._pin(found)
        self._peers[address] = found
        return found

    def close(self) -> None:
        self._peers.clear()
        self.receive_buffer.release()
        self._memory.close()
        os.close(self._file)
