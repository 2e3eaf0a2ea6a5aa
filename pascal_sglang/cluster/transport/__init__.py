"""How KV bytes get from one instance to another.

Every TP rank has a *receive buffer*: host memory that other instances write into. A target gives
each move a slot of its receive buffer; TP rank k of the source writes into the slot of TP rank
k of the target, and tells it through the control messages. `Transport` is the whole interface.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable

KINDS = ("shm", "mooncake")


class TransportError(Exception):
    """A receive buffer cannot be made or reached; the text is one line."""


class Transport(ABC):
    """One rank's receive buffer, and the way to the receive buffers of others.

    receive_buffer: its memory, read by this rank once a peer says that it wrote.
    address: what a peer's `room` and `put` take.
    direct: `room` is the peer's receive buffer itself; otherwise every call gives the same memory
    again.
    """

    kind: str
    address: str
    receive_buffer: memoryview
    direct: bool

    def open_peer(self, address: str) -> None:
        """Prepare a peer's receive buffer for writes. A failure is silent here; `room` raises
        it."""
        return

    def close_peer(self, address: str) -> None:
        """Give back what the way to a peer's receive buffer takes: it has died, and nothing is on
        its way there."""
        return

    @abstractmethod
    def room(self, address: str, offset: int, size: int) -> memoryview:
        """Where to write the `size` bytes that `put` then brings to `offset` of a peer's receive
        buffer.

        Raises: `TransportError` if there is no such receive buffer, or less room in it."""

    @abstractmethod
    def put(self, address: str, offset: int, size: int) -> None:
        """Bring what was written to `room` there; blocks for the time of that.

        Raises: `TransportError`; the peer's memory may then hold part of it."""

    @abstractmethod
    def close(self) -> None:
        """Give all memory back."""


def make(
    kind: str,
    receive_buffer: int,
    staging: int,
    pin: Callable[[memoryview], None] = lambda memory: None,
    listen: str | None = None,
    unpin: Callable[[memoryview], None] = lambda memory: None,
) -> Transport:
    """A transport of a kind; `receive_buffer` is its bytes of memory, `staging` of what one `put`
    brings. `auto` is `shm`: all instances of one controller run on its host. `pin` is given all
    memory that a device reads or writes, once, and `unpin` what is given back before the end.
    `listen` is the address at which peers on a network
    reach this one, none by default. Raises: `TransportError`."""
    if kind in ("auto", "shm"):
        from pascal_sglang.cluster.transport.shm import SharedMemory

        return SharedMemory(receive_buffer, pin, unpin)
    if kind == "mooncake":
        from pascal_sglang.cluster.transport.mooncake import Mooncake

        return Mooncake(receive_buffer, staging, pin, listen)
    raise TransportError(f"KV transport must be one of auto, {', '.join(KINDS)}, not {kind!r}")


def problem_with(kind: str) -> str | None:
    """Why a transport cannot work here at all, before anything is started."""
    if kind == "mooncake" and importlib.util.find_spec("mooncake") is None:
        return "the Mooncake Transfer Engine is not installed: pip install pascal_sglang[mooncake]"
    return None
