"""KV through shared memory, for instances on one host.

The landing is an anonymous shared memory file (`memfd_create`): peers of the same user open it by
the process that holds it. It has no name that a killed process could leave behind, and does not
count against the few MiB that containers give to named segments.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import OrderedDict

from pascal_sglang.cluster.transport import Transport, TransportError

_ADDRESS = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
# Landings of peers kept open.
PEERS = 1024


class SharedMemory(Transport):
    kind = "shm"

    def __init__(self, landing: int, staging: int) -> None:
        try:
            self._file = os.memfd_create("pascal-landing")
            os.ftruncate(self._file, landing)
            self._memory = mmap.mmap(self._file, landing)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"cannot make {landing} bytes of shared memory: {error}"
            ) from error
        self.address = f"/proc/{os.getpid()}/fd/{self._file}"
        self.landing = memoryview(self._memory)
        self._staging = bytearray(staging)
        self._peers: OrderedDict[str, mmap.mmap] = OrderedDict()

    def staging(self, size: int) -> memoryview:
        if size > len(self._staging):
            raise TransportError(f"{size} bytes do not fit {len(self._staging)} bytes of staging")
        return memoryview(self._staging)[:size]

    def put(self, address: str, offset: int, size: int) -> None:
        peer = self._peer(address)
        if offset < 0 or offset + size > len(peer):
            raise TransportError(f"{offset}+{size} is outside a landing of {len(peer)} bytes")
        peer[offset : offset + size] = self._staging[:size]

    def _peer(self, address: str) -> mmap.mmap:
        found = self._peers.get(address)
        if found is not None:
            return found
        if not _ADDRESS.fullmatch(address):
            raise TransportError("not the address of a landing")
        try:
            file = os.open(address, os.O_RDWR)
            try:
                found = mmap.mmap(file, os.fstat(file).st_size)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot open a peer's landing: {error}") from error
        self._peers[address] = found
        if len(self._peers) > PEERS:
            self._peers.popitem(last=False)[1].close()
        return found

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self.landing.release()
        self._memory.close()
        os.close(self._file)
