"""A request on its way in: its reserved memory, and its slot of the receive buffer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.migration_target import MigrationTarget
from pascal_sglang.cluster.receive_slots import ReceiveSlots
from pascal_sglang.engine.kv.host_copies import HostKV
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.serializer import KVSerializer

logger = logging.getLogger(__name__)

# Windows of a receive buffer, and so moves that one instance takes in at a time.
SLOTS = 8
SLOT_BYTES = 4 << 20
SLOT_TOKENS = 512


def slot_tokens(kv: KVSerializer) -> int:
    """KV entries that a slot takes: what is copied between two decode steps."""
    return max(16, min(SLOT_TOKENS, SLOT_BYTES // kv.per_token))


@dataclass(slots=True, eq=False)
class IncomingMigration:
    """One move to here. sender: the instance it comes from. locations: the KV entries reserved, in
    whole pages. req: made of its state, once that is here. reading: its slot is read, since the
    last pass; unsaid: what is said once that is over. taken: the request, once it is this
    instance's. through: the source writes into the slot no more; dead: the source has died."""

    sender: int
    locations: torch.Tensor
    slot: int
    target: MigrationTarget | None = None
    req: Req | None = None
    reading: HostKV | None = None
    unsaid: Sequence[Message] = ()
    taken: weakref.ref[Req] | None = None
    through: bool = False
    dead: bool = False


class ReceiveBuffer:
    """Memory for KV on its way in: entries of the pool, and slots.

    reserved: KV entries held. A slot is given to the next move when nothing uses it any more:
    closing are moves that are over and whose slots are read; `ReceiveSlots` knows which of the
    others a source may still write into.
    """

    def __init__(self, pool: Pool, kv: KVSerializer, memory: memoryview) -> None:
        self.pool = pool
        self.kv = kv
        self.memory = memory
        self.slot_tokens = slot_tokens(kv)
        self.reserved = 0
        self.closing: list[IncomingMigration] = []
        self.slots = ReceiveSlots(SLOTS)

    def reserve(self, sender: int, tokens: int) -> IncomingMigration | None:
        """Memory for `tokens` KV entries and a slot; None if there is none."""
        locations = self.pool.take(self.pool.in_pages(tokens))
        if locations is None:
            return None
        self.reserved += len(locations)
        return IncomingMigration(sender, locations, self.slots.take())

    def offset(self, incoming: IncomingMigration) -> int:
        """Where its slot begins, in bytes."""
        return incoming.slot * self.slot_tokens * self.kv.per_token

    def fetch(self, incoming: IncomingMigration, begin: int, end: int) -> bool:
        """Take KV of the tokens `begin`..`end` out of the slot; whether that worked. Deferred
        copies read it until `read` returns."""
        if end - begin > self.slot_tokens:
            return False
        at, size = self.offset(incoming), (end - begin) * self.kv.per_token
        if not size:
            return True
        # Of every rank, whether it fails or not: slots are free again in the same pass.
        incoming.reading = HostKV([], failed=True)
        try:
            memory = self.memory[at : at + size]
            incoming.reading = self.kv.copy_in(incoming.locations[begin:end], memory)
        except Exception:  # Whatever it is: the other ranks are told so, and wait for that.
            logger.exception("pascal_sglang: KV that arrived could not be written")
        if self.kv.copies.deferred:
            return not incoming.reading.failed
        return self.read(incoming)

    def read(self, incoming: IncomingMigration) -> bool:
        """Wait until nothing reads the slot any more; False if the device failed."""
        reading, incoming.reading = incoming.reading, None
        return reading is None or self.kv.copies.wait(reading)

    def close(self, now: float) -> bool:
        """The same for the slots of moves that are over."""
        closed, self.closing = self.closing, []
        failed = [incoming for incoming in closed if not self.read(incoming)]
        for incoming in closed:
            self._leave_slot(incoming, now)
        return not failed

    def through(self, migration: str, sender: int) -> None:
        """The source of a move that is over writes no more."""
        for incoming in self.closing:
            assert incoming.target is not None
            if incoming.target.migration == migration and incoming.sender == sender:
                incoming.through = True
        self.slots.confirmed(migration, sender)

    def died(self, sender: int, now: float) -> None:
        """The instance is no more."""
        for incoming in self.closing:
            incoming.dead |= incoming.sender == sender
        self.slots.died(sender, now)

    def _leave_slot(self, incoming: IncomingMigration, now: float) -> None:
        """Nothing reads the slot any more."""
        if incoming.through or incoming.target is None:
            self.slots.give_back(incoming.slot)
        else:
            migration, sender = incoming.target.migration, incoming.sender
            self.slots.doubt(incoming.slot, migration, sender, now, dead=incoming.dead)

    def keep(self, incoming: IncomingMigration, tokens: int, now: float) -> torch.Tensor:
        """The move is done: where its `tokens` KV entries are. The rest is given back. A source
        writes nothing after its Handover."""
        used = self.pool.in_pages(tokens)
        incoming.through = True
        self._give_back(incoming, incoming.locations[used:], now)
        return incoming.locations[:tokens]

    def drop(self, incoming: IncomingMigration, now: float) -> None:
        """The move has failed: all is given back."""
        assert incoming.target is not None
        incoming.through = incoming.target.why == "cancelled"
        incoming.dead = incoming.target.why == "source died"
        self._give_back(incoming, incoming.locations, now)

    def _give_back(self, incoming: IncomingMigration, locations: torch.Tensor, now: float) -> None:
        self.reserved -= len(incoming.locations)
        if incoming.reading is not None:
            # Steps that read this KV, or write where it is given back, come after the copy.
            self.kv.copies.hold_steps(incoming.reading)
            self.closing.append(incoming)
        else:
            self._leave_slot(incoming, now)
        if len(locations):
            self.pool.allocator.free(locations)


def receive_buffer_bytes(kv: KVSerializer) -> int:
    """Bytes of a rank's receive buffer."""
    return SLOTS * slot_tokens(kv) * kv.per_token
