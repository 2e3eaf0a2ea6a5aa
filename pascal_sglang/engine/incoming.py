"""A request on its way in: its reserved memory, and its window of the landing."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.target import Target
from pascal_sglang.engine.copies import HostKV
from pascal_sglang.engine.kv_bytes import KvBytes
from pascal_sglang.engine.pool import Pool

logger = logging.getLogger(__name__)

# Windows of a landing, and so moves that one instance takes in at a time.
WINDOWS = 8
WINDOW_BYTES = 4 << 20
WINDOW_TOKENS = 512
# How long a source that does not say that it is through may write into its window, in seconds.
LINGER_S = 10.0
# Why a move is over whose source is through.
THROUGH = ("cancelled", "source died")


def window_tokens(kv: KvBytes) -> int:
    """KV entries that a window takes: what is copied between two decode steps."""
    return max(16, min(WINDOW_TOKENS, WINDOW_BYTES // kv.per_token))


@dataclass(slots=True, eq=False)
class Incoming:
    """One move to here. sender: the instance it comes from. locations: the KV entries reserved, in
    whole pages. req: made of its state, once that is here. reading: its window is read, since the
    last pass; unsaid: what is said once that is over."""

    sender: int
    locations: torch.Tensor
    window: int
    target: Target | None = None
    req: Req | None = None
    reading: HostKV | None = None
    unsaid: Sequence[Message] = ()


class Landing:
    """Memory for KV on its way in: entries of the pool, and windows.

    reserved: KV entries held. A window is given to the next move when nothing uses it any more:
    closing are moves that are over and whose windows are read, lingering those whose sources may
    still write there, and until when.
    """

    def __init__(self, pool: Pool, kv: KvBytes, memory: memoryview) -> None:
        self.pool = pool
        self.kv = kv
        self.memory = memory
        self.window = window_tokens(kv)
        self.reserved = 0
        self.closing: list[Incoming] = []
        self.lingering: dict[Incoming, float] = {}
        self._free = deque(range(WINDOWS))

    @property
    def has_window(self) -> bool:
        return bool(self._free)

    def reserve(self, sender: int, tokens: int) -> Incoming | None:
        """Memory for `tokens` KV entries and a window; None if there is none."""
        locations = self.pool.take(self.pool.in_pages(tokens))
        if locations is None:
            return None
        self.reserved += len(locations)
        return Incoming(sender, locations, self._free.popleft())

    def offset(self, incoming: Incoming) -> int:
        """Where its window begins, in bytes."""
        return incoming.window * self.window * self.kv.per_token

    def fetch(self, incoming: Incoming, begin: int, end: int) -> bool:
        """Take KV of the tokens `begin`..`end` out of the window; whether that worked. Deferred
        copies read it until `read` returns."""
        if end - begin > self.window:
            return False
        at, size = self.offset(incoming), (end - begin) * self.kv.per_token
        if not size:
            return True
        # Of every rank, whether it fails or not: windows are free again in the same pass.
        incoming.reading = HostKV([], failed=True)
        try:
            memory = self.memory[at : at + size]
            incoming.reading = self.kv.copy_in(incoming.locations[begin:end], memory)
        except Exception:  # Whatever it is: the other ranks are told so, and wait for that.
            logger.exception("pascal_sglang: KV that arrived could not be written")
        if self.kv.copies.deferred:
            return not incoming.reading.failed
        return self.read(incoming)

    def read(self, incoming: Incoming) -> bool:
        """Wait until nothing reads the window any more; False if the device failed."""
        reading, incoming.reading = incoming.reading, None
        return reading is None or self.kv.copies.wait(reading)

    def close(self) -> bool:
        """The same for the windows of moves that are over."""
        closed, self.closing = self.closing, []
        failed = [incoming for incoming in closed if not self.read(incoming)]
        for incoming in closed:
            self._free_if_unused(incoming)
        return not failed

    def through(self, incoming: Incoming) -> None:
        """Its source writes no more."""
        if self.lingering.pop(incoming, None) is not None:
            self._free_if_unused(incoming)

    def expire(self, now: float) -> None:
        """Sources that have said nothing for so long write no more."""
        for incoming in [i for i, until in self.lingering.items() if now > until]:
            self.through(incoming)

    def _free_if_unused(self, incoming: Incoming) -> None:
        if incoming.reading is None and incoming not in self.lingering:
            self._free.append(incoming.window)

    def keep(self, incoming: Incoming, tokens: int) -> torch.Tensor:
        """The move is done: where its `tokens` KV entries are. The rest is given back."""
        used = self.pool.in_pages(tokens)
        self._give_back(incoming, incoming.locations[used:])
        return incoming.locations[:tokens]

    def drop(self, incoming: Incoming, now: float) -> None:
        """The move has failed: all is given back."""
        assert incoming.target is not None
        if incoming.target.why not in THROUGH:
            self.lingering[incoming] = now + LINGER_S
        self._give_back(incoming, incoming.locations)

    def _give_back(self, incoming: Incoming, locations: torch.Tensor) -> None:
        self.reserved -= len(incoming.locations)
        if incoming.reading is not None:
            # Steps that read this KV, or write where it is given back, come after the copy.
            self.kv.copies.hold_steps(incoming.reading)
            self.closing.append(incoming)
        self._free_if_unused(incoming)
        if len(locations):
            self.pool.allocator.free(locations)


def landing_bytes(kv: KvBytes) -> int:
    """Bytes of a rank's landing."""
    return WINDOWS * window_tokens(kv) * kv.per_token
