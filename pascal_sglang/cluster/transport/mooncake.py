"""KV through the Mooncake Transfer Engine: TCP here; RDMA or NVLink where the engine has them.

`MC_*` variables configure the engine, and `PASCAL_SGLANG_MOONCAKE` may name protocol and device,
for example `rdma:mlx5_0`. The engine asks nobody for a name or a key: a process that reaches its
ports can read and write the memory that is registered with it. So this is no more than the receive
buffer and the staging, and the ports hear one address alone, by default 127.0.0.1.
"""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import mmap
import os
import re
from collections.abc import Callable
from typing import Any

from pascal_sglang.cluster.transport import Transport, TransportError
from pascal_sglang.cluster.transport.listening import keep_to, listening

logger = logging.getLogger(__name__)

PROTOCOL_ENV = "PASCAL_SGLANG_MOONCAKE"
LOOPBACK = "127.0.0.1"
_ADDRESS = re.compile(r"([^/\s]{1,255})/([0-9]{1,20})\+([0-9]{1,20})")


class Mooncake(Transport):
    kind = "mooncake"
    direct = False

    def __init__(
        self,
        receive_buffer: int,
        staging: int,
        pin: Callable[[memoryview], None],
        listen: str | None = None,
    ) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise TransportError(f"the Mooncake Transfer Engine does not load: {error}") from error
        protocol, _, device = os.environ.get(PROTOCOL_ENV, "tcp").partition(":")
        host = listen or LOOPBACK
        before = listening()
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, device):
            raise TransportError(f"the Mooncake Transfer Engine does not start with {protocol}")
        try:
            ports = keep_to(host, before)  # Before there is any memory to reach.
        except OSError as error:
            raise TransportError(f"cannot keep Mooncake's ports to {host}: {error}") from error
        local = ipaddress.ip_address(host).is_loopback
        logger.warning(
            "pascal_sglang: Mooncake listens on %s, ports %s: %s can read and write the KV of "
            "requests that move",
            host,
            " and ".join(map(str, ports)),
            "every user of this host" if local else "everybody who reaches that address",
        )
        self._buffer, self._buffer_at = self._registered(receive_buffer)
        self._staging, self._staging_at = self._registered(staging)
        self.receive_buffer = memoryview(self._buffer)
        pin(self.receive_buffer)
        pin(memoryview(self._staging))
        session = f"{host}:{self._engine.get_rpc_port()}"
        self.address = f"{session}/{self._buffer_at}+{receive_buffer}"

    def _registered(self, size: int) -> tuple[mmap.mmap, int]:
        """Page-aligned memory that the engine may read and write, and where it is."""
        memory = mmap.mmap(-1, size)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if self._engine.register_memory(at, size):
            raise TransportError(f"the Mooncake Transfer Engine does not take {size} bytes")
        return memory, at

    def room(self, address: str, offset: int, size: int) -> memoryview:
        self._place(address, offset, size)
        if size > len(self._staging):
            raise TransportError(f"{size} bytes do not fit {len(self._staging)} bytes of staging")
        return memoryview(self._staging)[:size]

    def _place(self, address: str, offset: int, size: int) -> tuple[str, int]:
        """The peer's session, and where its receive buffer begins."""
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise TransportError("not the address of a receive buffer")
        session, at, room = found[1], int(found[2]), int(found[3])
        if offset < 0 or offset + size > room:
            raise TransportError(f"{offset}+{size} is outside a receive buffer of {room} bytes")
        return session, at

    def put(self, address: str, offset: int, size: int) -> None:
        session, at = self._place(address, offset, size)
        if self._engine.transfer_sync_write(session, self._staging_at, at + offset, size):
            raise TransportError(f"a write of {size} bytes to {session} failed")

    def close(self) -> None:
        self._engine.unregister_memory(self._buffer_at)
        self._engine.unregister_memory(self._staging_at)
