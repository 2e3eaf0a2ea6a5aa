"""How KV bytes get from one instance to another.

Every TP rank has a *receive buffer*: host memory that other instances write into. A target gives
each move a slot of its receive buffer; TP rank k of the source writes into the slot of TP rank
k of the target, and tells it through the control messages. `Transport` is the whole interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

KINDS = ("shm", "mooncake")


class TransportError(Exception):
    """A receive buffer cannot be made or reached; the text is one line."""


class Write:
    """One write into a peer's receive buffer: what is put into `memory` is there once `begin` has
    been called and `query` says so. This one is for memory that is the receive buffer itself."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.begun = False
        # Why it failed, one line.
        self.problem: str | None = None

    def begin(self) -> None:
        """`memory` is filled; returns at once, and does nothing the second time."""
        self.begun = True

    def query(self) -> bool | None:
        """Whether it is there; None while it is under way, False if it failed."""
        return True

    @property
    def seconds(self) -> float:
        """What it took so far, or in all."""
        return 0.0

    def abandon(self) -> None:
        """Give it up: nothing of it is sent from now on, though what was may still arrive."""
        return

    @property
    def at_rest(self) -> bool:
        """Whether this process has nothing to do with it any more, for good."""
        return True


class Transport(ABC):
    """One rank's receive buffer, and the way to the receive buffers of others.

    receive_buffer: its memory, read by this rank once a peer says that it wrote.
    address: what a peer's `room` takes.
    direct: the memory of a `Write` is the peer's receive buffer itself.
    writes: how many there may be at a time, from `room` until each is over; None for any number.
    """

    kind: str
    address: str
    receive_buffer: memoryview
    direct: bool
    writes: int | None = None

    def open_peer(self, address: str) -> None:
        """Prepare a peer's receive buffer for writes, and let the peer write to this one. A failure
        is silent here; `room` raises it."""
        return

    def close_peer(self, address: str) -> None:
        """Give back what the way to a peer's receive buffer takes: it has died, and nothing is on
        its way there."""
        return

    @abstractmethod
    def room(self, address: str, offset: int, size: int) -> Write:
        """A write of `size` bytes to `offset` of a peer's receive buffer, which has not begun.

        Raises: `TransportError` if there is no such receive buffer, or less room in it, or nothing
        to write from."""

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
    """A transport of a kind; `receive_buffer` is its bytes of memory, `staging` of the largest
    write. `auto` is `shm`: all instances of one controller run on its host. `pin` is given all
    memory that a device reads or writes, once, and `unpin` what is given back before the end.
    `listen` names the address at which peers on a network reach this one
    (`listening.own_address`), none by default. Raises: `TransportError`."""
    if kind in ("auto", "shm"):
        from pascal_sglang.cluster.transport.shm import SharedMemory

        return SharedMemory(receive_buffer, pin, unpin)
    if kind == "mooncake":
        from pascal_sglang.cluster.transport.mooncake import Mooncake

        return Mooncake(receive_buffer, staging, pin, listen)
    raise TransportError(f"KV transport must be one of auto, {', '.join(KINDS)}, not {kind!r}")


def problem_with(kind: str) -> str | None:
    """Why a transport cannot work here at all, before anything is started."""
    if kind != "mooncake":
        return None
    from pascal_sglang.cluster.transport.mooncake import problem_with_engine

    return problem_with_engine()
