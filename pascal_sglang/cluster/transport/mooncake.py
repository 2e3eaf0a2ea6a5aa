"""KV through the Mooncake Transfer Engine: TCP here; RDMA or NVLink where the engine has them.

`MC_*` variables configure the engine, and `PASCAL_SGLANG_MOONCAKE` may name protocol and device,
for example `rdma:mlx5_0`. The engine asks nobody for a name or a key: a process that reaches its
ports can read and write the memory that is registered with it. So this is no more than what the
protocol needs, the ports hear one address alone, by default 127.0.0.1, and of other hosts those
whose instances the control messages have named.

The engine's calls wait for a peer: minutes for one that does not answer. A thread for each peer
makes them, never the scheduler's. The first contact with a peer holds a lock of the engine, so that
all other writes wait for it until it is made or given up.
"""

from __future__ import annotations

import ctypes
import importlib.util
import ipaddress
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import Distribution
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
from packaging.version import Version

from pascal_sglang import clock
from pascal_sglang.cluster.transport import Transport, TransportError, Write
from pascal_sglang.cluster.transport.listening import (
    Gate,
    abort_connections,
    listening,
    own_address,
    source_towards,
)

logger = logging.getLogger(__name__)

PROTOCOL_ENV = "PASCAL_SGLANG_MOONCAKE"
LOOPBACK = "127.0.0.1"
# The first engine whose writes over TCP are acknowledged by the peer's engine (Mooncake's pull
# request 2850). One before it, or a later one with MC_TCP_PROTO=1, calls a write done when its last
# bytes are in this host's kernel, and a KVChunk would overtake them.
ACKNOWLEDGES = Version("0.3.12")
# Host and port of the peer's session, the port of its data (0 where that is not TCP), and where its
# receive buffer is.
_ADDRESS = re.compile(r"(([^/:\s]{1,255}):[0-9]{1,5})/([0-9]{1,5})/([0-9]{1,20})\+([0-9]{1,20})")
# Writes at a time, each from memory of its own.
WRITES = 2
# How often a thread looks whether its write is over, in seconds: often at first, as most are short.
LOOK_S, LOOK_AT_MOST_S = 0.0002, 0.002
# Until connections to a peer are aborted again, in seconds.
ABORT_AGAIN_S = 0.02
# The engine keeps connections, and one that has died shows it when it is used. It has so many lanes
# for a peer, opened as they are needed: the next one is tried at once. When all have failed, it
# waits for a second before it connects again, and then for the write after that.
LANES, TRIES = 2, 3
# What `transfer_check_status` says; anything else: it is under way.
_DONE, _FAILED = 1, -1


class Mooncake(Transport):
    kind = "mooncake"
    direct = False
    writes = WRITES

    def __init__(
        self,
        receive_buffer: int,
        staging: int,
        pin: Callable[[memoryview], None],
        listen: str | None = None,
    ) -> None:
        if problem := problem_with_engine():
            raise TransportError(problem)
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise TransportError(f"the Mooncake Transfer Engine does not load: {error}") from error
        protocol, _, device = os.environ.get(PROTOCOL_ENV, "tcp").partition(":")
        try:
            self.host = host = own_address(listen or LOOPBACK)
        except ValueError as error:
            raise TransportError(f"cannot listen at {listen}: {error}") from error
        before = listening()
        os.environ.setdefault("MC_TCP_LANES_PER_PEER", f"{LANES}")
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, device):
            raise TransportError(f"the Mooncake Transfer Engine does not start with {protocol}")
        try:
            self.gate = Gate(host, before)  # Before there is any memory to reach.
        except OSError as error:
            raise TransportError(f"cannot keep Mooncake's ports to {host}: {error}") from error
        ports = self.gate.ports
        local = ipaddress.ip_address(host).is_loopback
        logger.warning(
            "pascal_sglang: Mooncake listens on %s, ports %s: %s can read and write the KV of "
            "requests that move",
            host,
            " and ".join(map(str, ports)),
            "every user of this host" if local else "every user of a host with instances",
        )
        self._buffer, self._buffer_at = _memory(receive_buffer)
        self._register(self._buffer_at, receive_buffer)
        # TCP reads it without; others need their keys for it, and peers could read it too.
        self._registers_staging = protocol != "tcp"
        self._staging = [_memory(staging) for _ in range(WRITES)]
        self._free = [*range(WRITES)]
        self.receive_buffer = memoryview(self._buffer)
        pin(self.receive_buffer)
        for memory, at in self._staging:
            pin(memoryview(memory))
            if self._registers_staging:
                self._register(at, staging)
        rpc_port = self._engine.get_rpc_port()
        data_port = next((port for port in ports if port != rpc_port), 0)
        self.address = f"{host}:{rpc_port}/{data_port}/{self._buffer_at}+{receive_buffer}"
        self._peers: dict[str, _Peer] = {}
        self._admitted: dict[str, str] = {}

    def _register(self, at: int, size: int) -> None:
        if self._engine.register_memory(at, size):
            raise TransportError(f"the Mooncake Transfer Engine does not take {size} bytes")

    def open_peer(self, address: str) -> None:
        found = _ADDRESS.fullmatch(address)
        if not found:
            return
        with suppress(ValueError):
            self._admitted[address] = str(ipaddress.IPv4Address(found[2]))
            self._admit()
            self._warn_of_detour(self._admitted[address])

    def _admit(self) -> None:
        try:
            self.gate.admit(self._admitted.values())
        except OSError as error:
            logger.warning("pascal_sglang: Mooncake cannot let other hosts in: %s", error)

    def _warn_of_detour(self, host: str) -> None:
        """The peer lets in connections of `self.host` alone."""
        try:
            source = source_towards(host)
        except OSError as error:
            logger.warning("pascal_sglang: no way to Mooncake on %s: %s", host, error)
            return
        if source != self.host:
            logger.warning(
                "pascal_sglang: connections to %s come from %s, not from %s, and are dropped there",
                host,
                source,
                self.host,
            )

    def close_peer(self, address: str) -> None:
        host = self._admitted.pop(address, None)
        if host is not None:
            self._admit()
            # The kernel of a process that has died goes on sending what it had: for minutes if the
            # link is cut, into slots that others have by then. Other instances on that host connect
            # again.
            self._at_least_try(lambda: self.gate.abort(host))
        peer = self._peers.pop(address, None)
        if peer is not None:
            self._at_least_try(peer.close)

    def _at_least_try(self, what: Callable[[], object]) -> None:
        """Looking for connections takes file descriptors, which may be spent."""
        try:
            what()
        except (OSError, psutil.Error) as error:
            logger.warning("pascal_sglang: connections of Mooncake stay open: %s", error)

    def room(self, address: str, offset: int, size: int) -> Write:
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise TransportError("not the address of a receive buffer")
        at, room = int(found[4]), int(found[5])
        if offset < 0 or offset + size > room:
            raise TransportError(f"{offset}+{size} is outside a receive buffer of {room} bytes")
        staging = len(self._staging[0][0])
        if size > staging:
            raise TransportError(f"{size} bytes do not fit {staging} bytes of staging")
        if not self._free:
            raise TransportError("earlier writes are still under way")
        peer = self._peers.get(address)
        if peer is None:
            ports = {int(found[1].rpartition(":")[2]), int(found[3])} - {0}
            peer = self._peers[address] = _Peer(self._engine, found[1], found[2], ports)
        return _MooncakeWrite(self, peer, self._free.pop(), at + offset, size)

    def close(self) -> None:
        for peer in self._peers.values():
            self._at_least_try(peer.close)
        self.gate.close()
        self._engine.unregister_memory(self._buffer_at)
        if self._registers_staging:
            for _, at in self._staging:
                self._engine.unregister_memory(at)


class _MooncakeWrite(Write):
    """What its peer's thread makes of it. The memory is given to another write only when the engine
    has nothing to do with it any more."""

    def __init__(self, transport: Mooncake, peer: _Peer, index: int, at: int, size: int) -> None:
        memory, self.source = transport._staging[index]
        super().__init__(memoryview(memory)[:size])
        self.target, self.size = at, size
        self._free, self._index, self.peer = transport._free, index, peer
        self.abandoned = False
        self._began = 0.0
        self._seconds: float | None = None
        self._done: bool | None = None

    def begin(self) -> None:
        if not (self.begun or self.abandoned):
            self.begun, self._began = True, clock.now()
            self.peer.writes.put(self)

    def over(self, problem: str | None) -> None:
        """By its peer's thread: the engine is done with it."""
        self.problem = problem
        self._seconds = clock.now() - self._began
        self._free.append(self._index)
        self._done = problem is None  # At last: the scheduler then counts on its memory.

    def query(self) -> bool | None:
        return False if self.abandoned else self._done

    @property
    def seconds(self) -> float:
        if self._seconds is not None:
            return self._seconds
        return clock.now() - self._began if self.begun else 0.0

    def abandon(self) -> None:
        if self._done is not None or self.abandoned:
            return
        self.abandoned, self.problem = True, "given up"
        if self.begun:
            self.peer.abandon(self)
        else:
            self._free.append(self._index)
            self._done = False

    @property
    def at_rest(self) -> bool:
        return self._done is not None


class _Peer:
    """A peer's session, and the thread that writes to it, one write after the other.

    ports: those of its host that the engine connects to.
    """

    def __init__(self, engine: Any, session: str, host: str, ports: set[int]) -> None:
        self.writes: SimpleQueue[_MooncakeWrite | None] = SimpleQueue()
        self._engine, self._session, self._host, self._ports = engine, session, host, ports
        # What the thread carries out, and the lock to change or to abort it.
        self._current: _MooncakeWrite | None = None
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._work, name=f"mooncake {session}", daemon=True).start()

    def abandon(self, write: _MooncakeWrite) -> None:
        """End a write that is abandoned. One that waits for another ends when its turn comes."""
        if self._current is write:
            # Finding connections takes milliseconds, and the peer's thread may be inside a call.
            threading.Thread(target=self._abort, args=(write,), daemon=True).start()

    def _abort(self, write: _MooncakeWrite) -> None:
        # Again and again: what is about to connect has no connection yet.
        while True:
            with self._lock:
                if self._current is not write:
                    return
                with suppress(Exception):  # Whatever it is: the write is not over yet.
                    abort_connections(self._host, self._ports)
            time.sleep(ABORT_AGAIN_S)

    def close(self) -> None:
        """End the thread, after what is under way, which fails. Raises: OSError."""
        self._closed = True
        self.writes.put(None)
        abort_connections(self._host, self._ports)

    def _work(self) -> None:
        while (write := self.writes.get()) is not None:
            self._current = write
            problem: str | None = "given up"
            for _ in range(TRIES):
                if problem is None or write.abandoned or self._closed:
                    break
                try:
                    problem = self._carry_out(write)
                except Exception as error:  # Whatever it is: the move that waits for it ends.
                    problem = f"{error}"
            with self._lock:  # The next one is not aborted in its place.
                self._current = None
            write.over(problem)

    def _carry_out(self, write: _MooncakeWrite) -> str | None:
        """None, or why it failed."""
        engine, failed = self._engine, f"a write of {write.size} bytes to {self._session} failed"
        number = engine.transfer_submit_write(self._session, write.source, write.target, write.size)
        if not number:
            return failed
        look = LOOK_S
        while (status := engine.transfer_check_status(number)) not in (_DONE, _FAILED):
            time.sleep(look)
            look = min(look * 1.5, LOOK_AT_MOST_S)
        return None if status == _DONE else failed


def problem_with_engine() -> str | None:
    """Why the engine that is installed is none to use, one line."""
    if os.environ.get("MC_TCP_PROTO") == "1":
        return "MC_TCP_PROTO=1 calls a write done before it has arrived"
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        return "the Mooncake Transfer Engine is not installed: pip install pascal_sglang[mooncake]"
    beside = Path(spec.submodule_search_locations[0]).parent
    # One for each kind of device, and all of them bring the same module.
    found = [Distribution.at(each) for each in beside.glob("mooncake_transfer_engine*.dist-info")]
    if found and all(Version(each.version) >= ACKNOWLEDGES for each in found):
        return None
    here = ", ".join(f"{each.name} {each.version}" for each in found) or "it has no version here"
    return (
        f"the Mooncake Transfer Engine has to be {ACKNOWLEDGES} or newer, an older one calls a "
        f"write done before it has arrived: {here}"
    )


def _memory(size: int) -> tuple[mmap.mmap, int]:
    """Page-aligned memory, and where it is."""
    memory = mmap.mmap(-1, size)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))
