"""Copies under way, and what all TP ranks know of them together.

A device says of itself when a copy is complete, and another one later. So ranks agree once a pass,
with the clock that they agree on anyway, up to which copy all are complete everywhere. Nothing is
waited for by that; `finish` is for memory that is needed now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pascal_sglang.engine.kv.host_copies import EntryCopies
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree, least

# Copies between a pool and host memory, each with whose copies it is among.
Parts = list[tuple[EntryCopies, HostKV]]


@dataclass(slots=True, eq=False)
class Transfer:
    """What one decision has copied; all ranks have the same ones in the same order."""

    number: int
    parts: Parts
    # This rank could not begin it.
    failed: bool
    # Whether it is there on every rank; None while that is not known.
    complete: bool | None = None

    def query(self) -> bool | None:
        """Whether it is complete here; None while it is under way, False if it failed."""
        found = [copies.query(kv) for copies, kv in self.parts]
        if None in found:
            return None
        return not self.failed and all(found)

    def wait(self) -> bool:
        """Until it is complete here, or has failed; whether it is complete."""
        found = [copies.wait(kv) for copies, kv in self.parts]
        return not self.failed and all(found)


class Transfers:
    """One scheduler's copies under way."""

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        self._begun = 0
        self._open: dict[int, Transfer] = {}  # In the order of their numbers.

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way, as far as all ranks know."""
        return not self._open

    def begin(self, parts: Parts, *, failed: bool = False) -> Transfer:
        """Copies have begun. To be called on every rank, whether it `failed` there or not."""
        self._begun += 1
        transfer = self._open[self._begun] = Transfer(self._begun, parts, failed)
        return transfer

    def progress(self) -> tuple[float, float]:
        """This rank's word: all copies up to the first number have ended here, and the last of them
        has failed if the second number is the same."""
        done = 0
        for number, transfer in self._open.items():
            complete = transfer.query()
            if complete is None:
                return done, math.inf
            if not complete:
                return number, number
            done = number
        return math.inf, math.inf

    def heard(self, done: float, failed: float) -> None:
        """The least of what all ranks gave as their `progress`."""
        for number in [number for number in self._open if number <= done]:
            self._open.pop(number).complete = number != failed

    def is_begun(self, transfer: Transfer) -> bool:
        """Whether all of it has begun on every rank, without waiting for it."""
        begun = not transfer.failed and not any(kv.failed for _, kv in transfer.parts)
        return all_agree(self._scheduler, begun)

    def finish(self, *transfers: Transfer) -> bool:
        """Wait until these are complete on every rank; whether all are. The ranks meet for that,
        unless it is known."""
        left = [transfer for transfer in transfers if transfer.complete is None]
        found = least(self._scheduler, *(float(transfer.wait()) for transfer in left))
        for transfer, complete in zip(left, found, strict=True):
            transfer.complete = bool(complete)
            del self._open[transfer.number]
        return all(transfer.complete for transfer in transfers)

    def wait_here(self) -> None:
        """Wait until nothing is read or written by a copy on this rank. The ranks do not meet for
        that, and say so with the next `progress`."""
        for transfer in self._open.values():
            transfer.wait()

    def finish_all(self) -> None:
        """Wait for everything that is under way."""
        self.finish(*self._open.values())
