"""Memory for requests on their way in: KV entries of the pool, and slots of the receive buffer."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pascal_sglang.cluster.receive_slots import ReceiveSlots
from pascal_sglang.engine.kv.host_copies import HostKV
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.serializer import KVSerializer, Parts

logger = logging.getLogger(__name__)

# Windows of a receive buffer, and so moves that one instance takes in at a time.
SLOTS = 8
SLOT_BYTES = 4 << 20
SLOT_TOKENS = 512


def slot_tokens(kv: KVSerializer) -> int:
    """KV entries that a slot takes: what is copied between two decode steps."""
    return max(16, min(SLOT_TOKENS, SLOT_BYTES // kv.per_token))


@dataclass(slots=True, eq=False)
class Reservation:
    """What a migration to here holds."""

    migration: str
    # The instance it comes from.
    sender: int
    # The KV entries reserved, in whole pages.
    locations: torch.Tensor
    # How many of the first come without entries of sliding windows, in whole pages.
    before: int
    # Where its recurrent state goes; None for models without.
    state: torch.Tensor | None
    # Number of its slot.
    slot: int
    # The slot is being read, since the last pass.
    reading: Parts | None = None
    # The source writes into the slot no more.
    through: bool = False
    # The source has died.
    dead: bool = False


class ReceiveBuffer:
    """Memory for KV on its way in: entries of the pool, and slots.

    reserved: KV entries held, and with them `reserved_windows` of sliding windows. A slot is given
    to the next move when nothing uses it any more: closing are moves that are over and whose slots
    are read; `ReceiveSlots` knows which of the others a source may still write into.
    """

    def __init__(self, pool: Pool, kv: KVSerializer, memory: memoryview) -> None:
        self.pool = pool
        self.kv = kv
        self.memory = memory
        self.slot_tokens = slot_tokens(kv)
        self.slot_bytes = slot_bytes(kv)
        self.reserved = self.reserved_windows = 0
        self.closing: list[Reservation] = []
        self.slots = ReceiveSlots(SLOTS)

    def reserve(self, migration: str, sender: int, tokens: int, before: int) -> Reservation | None:
        """Memory for `tokens` KV entries, the first `before` without those of sliding windows, and
        a recurrent state if there are any, and a slot; None if there is none. A request without KV
        has no state either."""
        before = self.in_whole_pages(before)
        locations = self.pool.take(self.pool.in_pages(tokens), before)
        if locations is None:
            return None
        with_state = tokens > 0 and self.pool.states is not None
        state = self.pool.take_state() if with_state else None
        if with_state and state is None:
            self.pool.give(locations, before)
            return None
        reservation = Reservation(migration, sender, locations, before, state, self.slots.take())
        self._count(reservation, 1)
        return reservation

    def _count(self, reservation: Reservation, sign: int) -> None:
        held = len(reservation.locations)
        self.reserved += sign * held
        if self.pool.windows is not None:
            self.reserved_windows += sign * (held - reservation.before)

    def in_whole_pages(self, before: int) -> int:
        """Leading tokens whose entries of sliding windows are not needed: pages are had or not."""
        return before - before % self.pool.in_pages(1)

    def offset(self, reservation: Reservation) -> int:
        """Where its slot begins, in bytes."""
        return reservation.slot * self.slot_bytes

    def fetch(
        self, reservation: Reservation, begin: int, end: int, before: int, *, stopped: bool = False
    ) -> bool:
        """Take KV of the tokens `begin`..`end` out of the slot, the first `before` of the request's
        without entries of sliding windows; whether that worked. stopped: its recurrent state too.
        Deferred copies read it until `read` returns."""
        if end - begin > self.slot_tokens or before < reservation.before:
            return False
        before = max(0, before - begin)
        with_state = stopped and reservation.state is not None
        at, size = self.offset(reservation), self.kv.size(end - begin, before, state=with_state)
        if not size:
            return True
        # Of every rank, whether it fails or not: slots are free again in the same pass.
        reservation.reading = [(self.kv.copies, HostKV([], failed=True))]
        try:
            memory = self.memory[at : at + size]
            where = reservation.locations[begin:end]
            parts = self.kv.copy_in(where, before, memory) if begin < end else []
            if with_state and reservation.state is not None:
                parts += self.kv.state_in(reservation.state, memory)
            reservation.reading = parts
        except Exception:  # Whatever it is: the other ranks are told so, and wait for that.
            logger.exception("pascal_sglang: KV that arrived could not be written")
        if self.kv.copies.deferred:
            return not any(kv.failed for _, kv in reservation.reading)
        return self.read(reservation)

    def read(self, reservation: Reservation) -> bool:
        """Wait until nothing reads the slot any more; False if the device failed."""
        reading, reservation.reading = reservation.reading, None
        return reading is None or self.kv.wait(reading)

    def close(self, now: float) -> bool:
        """The same for the slots of moves that are over."""
        closed, self.closing = self.closing, []
        failed = [reservation for reservation in closed if not self.read(reservation)]
        for reservation in closed:
            self._leave_slot(reservation, now)
        return not failed

    def through(self, migration: str, sender: int) -> None:
        """The source of a move that is over writes no more."""
        for reservation in self.closing:
            if reservation.migration == migration and reservation.sender == sender:
                reservation.through = True
        self.slots.confirmed(migration, sender)

    def died(self, sender: int, now: float) -> None:
        """The instance is no more."""
        for reservation in self.closing:
            reservation.dead |= reservation.sender == sender
        self.slots.died(sender, now)

    def _leave_slot(self, reservation: Reservation, now: float) -> None:
        """Nothing reads the slot any more."""
        if reservation.through:
            self.slots.give_back(reservation.slot)
        else:
            migration, sender = reservation.migration, reservation.sender
            self.slots.doubt(reservation.slot, migration, sender, now, dead=reservation.dead)

    def keep(
        self, reservation: Reservation, tokens: int, before: int, now: float
    ) -> tuple[torch.Tensor, int]:
        """The move is done: where its `tokens` KV entries are, and how many of the first have no
        entries of sliding windows, where the source gave `before`. The rest is given back. A source
        writes nothing after its Handover."""
        used, before = self.pool.in_pages(tokens), self.in_whole_pages(before)
        reservation.through = True
        self._leave(reservation, now)
        self.pool.give_windows(reservation.locations[reservation.before : before])
        self._give(reservation.locations[used:], 0)
        return reservation.locations[:tokens], before

    def drop(self, reservation: Reservation, why: str, now: float) -> None:
        """The migration has failed: all is given back."""
        reservation.through = why == "cancelled"
        reservation.dead = why == "source died"
        self._leave(reservation, now)
        self._give(reservation.locations, reservation.before)
        if reservation.state is not None and self.pool.states is not None:
            self.pool.states.give(reservation.state)

    def _leave(self, reservation: Reservation, now: float) -> None:
        """What is reserved is held by the move no longer."""
        self._count(reservation, -1)
        if reservation.reading is not None:
            # Steps that read this KV, or write where it is given back, come after the copy.
            self.kv.hold_steps(reservation.reading)
            self.closing.append(reservation)
        else:
            self._leave_slot(reservation, now)

    def _give(self, locations: torch.Tensor, before: int) -> None:
        if len(locations):
            self.pool.give(locations, before)


def slot_bytes(kv: KVSerializer) -> int:
    """Bytes of a slot: of what is copied at once, with a recurrent state at the end."""
    return kv.size(slot_tokens(kv), 0, state=True)


def receive_buffer_bytes(kv: KVSerializer) -> int:
    """Bytes of a rank's receive buffer."""
    return SLOTS * slot_bytes(kv)
