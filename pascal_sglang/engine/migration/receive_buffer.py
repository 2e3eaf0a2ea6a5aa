"""Memory for requests on their way in: KV entries of the pool, and slots of the receive buffer."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import torch

from pascal_sglang.cluster.migration_source import WINDOWS
from pascal_sglang.cluster.receive_slots import ReceiveSlots
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.serializer import KVSerializer, aligned
from pascal_sglang.engine.kv.transfers import Parts, Transfer, Transfers

logger = logging.getLogger(__name__)

# Slots of a receive buffer, and so moves that one instance takes in at a time.
SLOTS = 8
# A window of a slot takes so many bytes and tokens at most: on a link whose speed is not known yet
# that is a piece. A device's link carries more in a step, but the memory is pinned.
WINDOW_BYTES = 64 << 20
WINDOW_TOKENS = 512
# And it takes so many tokens at least, however little memory there is.
LEAST_TOKENS = 16
# What the windows of all ranks take of the machine's memory at most, or of the control group's.
SHARE = 1 / 16


def window_bytes(total: int, ranks: int) -> int:
    """Bytes that a window takes at most where so many ranks share `total` bytes of memory."""
    return min(WINDOW_BYTES, int(total * SHARE / ranks / (SLOTS * WINDOWS)))


def window_tokens(kv: KVSerializer, most: int = WINDOW_BYTES) -> int:
    """KV entries that a window of a slot takes, which has `most` bytes at most."""
    return max(LEAST_TOKENS, min(WINDOW_TOKENS, most // kv.per_token))


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
    # Pieces that are being read, oldest first, and how many there have been.
    reading: deque[Transfer] = field(default_factory=deque)
    pieces: int = 0
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

    def __init__(
        self,
        pool: Pool,
        kv: KVSerializer,
        memory: memoryview,
        transfers: Transfers,
        most: int = WINDOW_BYTES,
    ) -> None:
        """most: bytes of a window; `memory` is `receive_buffer_bytes` of them."""
        self.pool = pool
        self.kv = kv
        self.transfers = transfers
        self.memory = memory
        self.slot_tokens = window_tokens(kv, most)
        self.slot_bytes = slot_bytes(kv, most)
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
        """Begin to take KV of the tokens `begin`..`end` out of the slot, the first `before` of the
        request's without entries of sliding windows. Pieces are in windows in turn, and `has_read`
        says when one is read. stopped: what is left is at the slot's beginning, and the recurrent
        state is there too; whether that can be had, on all ranks."""
        if end - begin > self.slot_tokens or before < reservation.before:
            return False
        at = self.offset(reservation)
        if not stopped:
            at += reservation.pieces % WINDOWS * self.kv.window_bytes(self.slot_tokens)
            reservation.pieces += 1
        before = max(0, before - begin)
        with_state = stopped and reservation.state is not None
        size = self.kv.size(end - begin, before, state=with_state)
        if stopped and not size:
            return True
        parts, failed = Parts(), False
        try:
            memory = self.memory[at : at + size]
            where = reservation.locations[begin:end]
            if begin < end:
                self.kv.copy_in(where, before, memory, parts)
            if with_state and reservation.state is not None:
                self.kv.state_in(reservation.state, memory, parts)
        except Exception:  # Whatever it is: the other ranks are told so, and wait for that.
            failed = True
            logger.exception("pascal_sglang: KV that arrived could not be written")
        # On every rank, whether it fails or not.
        reading = self.transfers.begin(parts, failed=failed)
        reservation.reading.append(reading)
        if not stopped:
            return True
        if self.kv.copies.deferred:
            return self.transfers.is_begun(reading)
        return self.transfers.finish(*reservation.reading)

    def has_read(self, reservation: Reservation) -> bool | None:
        """Whether the oldest piece is read, on every rank; None while that is not known, False if
        the device failed. After that of the next one."""
        oldest = reservation.reading[0]
        if oldest.complete is None and not self.kv.copies.deferred:
            self.transfers.finish(oldest)
        if oldest.complete is not None:
            reservation.reading.popleft()
        return oldest.complete

    def close(self, now: float) -> None:
        """Give up the slots of moves that are over once they are read."""
        for reservation in self.closing:
            while reservation.reading and self.has_read(reservation) is not None:
                pass
        read = [reservation for reservation in self.closing if not reservation.reading]
        self.closing = [reservation for reservation in self.closing if reservation.reading]
        for reservation in read:
            self._leave_slot(reservation, now)

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

    def give_back(self, reservation: Reservation, locations: torch.Tensor, before: int) -> None:
        """What `keep` has returned is not needed after all."""
        used = self.pool.in_pages(len(locations))
        self._give(reservation.locations[:used], before)
        self._give_state(reservation)

    def drop(self, reservation: Reservation, why: str, now: float) -> None:
        """The migration has failed: all is given back."""
        reservation.through = why == "cancelled"
        reservation.dead = why == "source died"
        self._leave(reservation, now)
        self._give(reservation.locations, reservation.before)
        self._give_state(reservation)

    def _give_state(self, reservation: Reservation) -> None:
        if reservation.state is not None and self.pool.states is not None:
            self.pool.states.give(reservation.state)

    def _leave(self, reservation: Reservation, now: float) -> None:
        """What is reserved is held by the move no longer."""
        self._count(reservation, -1)
        if reservation.reading:
            # Steps that read this KV, or write where it is given back, come after the copies.
            for reading in reservation.reading:
                self.kv.hold_steps(reading.parts)
            self.closing.append(reservation)
        else:
            self._leave_slot(reservation, now)

    def _give(self, locations: torch.Tensor, before: int) -> None:
        if len(locations):
            self.pool.give(locations, before)


def piece_bytes(kv: KVSerializer, most: int = WINDOW_BYTES) -> int:
    """Bytes of the largest piece, with a recurrent state at the end."""
    return aligned(kv.size(window_tokens(kv, most), 0, state=True))


def slot_bytes(kv: KVSerializer, most: int = WINDOW_BYTES) -> int:
    """Bytes of a slot: of its windows, or of the last piece."""
    return max(WINDOWS * kv.window_bytes(window_tokens(kv, most)), piece_bytes(kv, most))


def receive_buffer_bytes(kv: KVSerializer, most: int = WINDOW_BYTES) -> int:
    """Bytes of a rank's receive buffer."""
    return SLOTS * slot_bytes(kv, most)
