"""How KV bytes get from one instance to another.

Every TP rank has a *landing*: host memory that other instances write into. A target gives each move
a window of its landing; TP rank k of the source writes into the window of TP rank k of the target,
and tells it through the control messages. `Transport` is the whole interface.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod

KINDS = ("shm", "mooncake")


class TransportError(Exception):
    """A landing cannot be made or reached; the text is one line."""


class Transport(ABC):
    """One rank's landing, and the way to the landings of others.

    landing: its memory, read by this rank once a peer says that it wrote.
    address: what a peer's `put` takes. Calls block for the time of the copy alone.
    """

    kind: str
    address: str
    landing: memoryview

    @abstractmethod
    def staging(self, size: int) -> memoryview:
        """`size` bytes of this rank's memory from which `put` copies; valid until the next call.
        Raises: `TransportError` for more than there is."""

    @abstractmethod
    def put(self, address: str, offset: int, size: int) -> None:
        """Write the first `size` bytes of `staging` at `offset` of a peer's landing.

        Raises: `TransportError`; the peer's memory may then hold part of it."""

    @abstractmethod
    def close(self) -> None:
        """Give all memory back."""


def make(kind: str, landing: int, staging: int) -> Transport:
    """A transport of a kind; `landing` and `staging` are bytes of memory. `auto` is `shm`: all
    instances of one controller run on its host. Raises: `TransportError`."""
    if kind in ("auto", "shm"):
        from pascal_sglang.cluster.transport.shm import SharedMemory

        return SharedMemory(landing, staging)
    if kind == "mooncake":
        from pascal_sglang.cluster.transport.mooncake import Mooncake

        return Mooncake(landing, staging)
    raise TransportError(f"KV transport must be one of auto, {', '.join(KINDS)}, not {kind!r}")


def problem_with(kind: str) -> str | None:
    """Why a transport cannot work here at all, before anything is started."""
    if kind == "mooncake" and importlib.util.find_spec("mooncake") is None:
        return "the Mooncake Transfer Engine is not installed: pip install pascal_sglang[mooncake]"
    return None
