"""The KV of a request on its way out: reads it wherever the engine has it, and lets go of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.cluster.messages import ReserveGranted
from pascal_sglang.cluster.migration_source import WINDOWS
from pascal_sglang.cluster.transport import Transport, TransportError, Write
from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.recurrent_states import RecurrentStates
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.kv.transfers import Parts, Transfer
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.policy.kv_tier import KVTier
from pascal_sglang.policy.request import RequestStatus

logger = logging.getLogger(__name__)

# A rank's word on a write over a network: under way, failed, or else how fast it went, in tokens a
# second; the least of all ranks is what holds for all.
UNDER_WAY, FAILED = 0.0, 1e-9

# Where a paused request's KV can be read.
KEPT: dict[PauseStatus | None, RequestStatus] = {
    PauseStatus.RESIDENT: RequestStatus.RESIDENT,
    PauseStatus.HOST: RequestStatus.HOST,
}


@dataclass(kw_only=True, slots=True, eq=False)
class OutgoingKV:
    """The KV of one request on its way out."""

    req: Req
    paused_requests: PausedRequests
    transport: Transport
    serializer: KVSerializer
    tp_rank: int
    # The target's word on where the KV goes.
    granted: ReserveGranted | None = None
    # By this rank.
    bytes_sent: int = 0
    # The piece that is copied beside the decoding.
    writing: Transfer | None = None
    # Tokens of the piece that goes over a network, until it has arrived; and the ranks' word on it.
    sending: int | None = None
    rate: float = UNDER_WAY
    _pieces: int = 0
    _copy: Parts | None = None
    _written: Write | None = None
    _problem: str | None = None

    def status(self, running: set[Req]) -> RequestStatus | None:
        """Where the request is; None while its KV cannot be read (it leaves or joins the batch, or
        its place may be given to others as soon as a copy of it is complete)."""
        paused = self.paused_requests.status_of(self.req)
        if self.paused_requests.is_spilling(self.req):
            return None
        if (kept := KEPT.get(paused)) is not None:
            return kept
        if self.req in running:
            return RequestStatus.RUNNING
        between = paused in (PauseStatus.LEAVING, PauseStatus.ARRIVING)
        return None if between else RequestStatus.WAITING

    def is_lost(self, running: set[Req]) -> bool:
        """Whether its KV is here no more: it is to be prefilled again."""
        return self.status(running) is RequestStatus.WAITING

    def tokens(self, status: RequestStatus, in_flight: bool) -> int:
        """KV entries that are written for good."""
        if status is RequestStatus.HOST:
            return self.paused_requests.copy_of(self.req).tokens
        # A step under way still writes the last one.
        return int(self.req.kv.kv_committed_len) - in_flight

    def before(self, status: RequestStatus, tokens: int) -> int:
        """How many of the request's first `tokens` KV entries have no peers in the pool for sliding
        windows any more."""
        windows = self.paused_requests.pool.windows
        if windows is None:
            return 0
        if status is RequestStatus.HOST:
            return self.paused_requests.copy_of(self.req).before
        return windows.before(tokens)

    def write(
        self,
        begin: int,
        end: int,
        before: int,
        status: RequestStatus,
        *,
        stopped: bool = False,
        beside: bool = False,
    ) -> None:
        """Begin to put KV of the tokens `begin`..`end` into the target's slot, the first `before`
        of the request's without entries of sliding windows. stopped: all that is left, and its
        recurrent state too. `written` says what came of it; beside: `is_written` does."""
        self._problem = self._written = self._copy = None
        before = max(0, before - begin)
        try:
            self._write(begin, end, before, status, stopped=stopped)
        except TransportError as error:
            self._problem = str(error)
        except Exception as error:  # Whatever it is: the other ranks wait to be told so.
            self._problem = f"reading KV failed: {error}"
        if not beside:
            return
        if self._problem is not None:
            logger.warning("pascal_sglang: %s", self._problem)
        failed = self._problem is not None
        # The same on all ranks, whatever failed on one.
        if self.serializer.copies.deferred:
            self.writing = self.paused_requests.transfers.begin(self._copy or [], failed=failed)
        if not self.transport.direct and self.serializer.size(end - begin, before, state=stopped):
            self.sending, self.rate = end - begin, UNDER_WAY
            self.word()

    def _write(
        self, begin: int, end: int, before: int, status: RequestStatus, *, stopped: bool
    ) -> None:
        assert self.granted is not None
        offset = self.granted.offset
        if not stopped:
            offset += (
                self._pieces % WINDOWS * self.serializer.window_bytes(self.granted.slot_tokens)
            )
            self._pieces += 1
        size = self.serializer.size(end - begin, before, state=stopped)
        if not size:
            return
        with_state = stopped and self.serializer.state_bytes > 0
        if self.tp_rank >= len(self.granted.receive_buffers):
            raise TransportError("the target has fewer TP ranks")
        there = self.transport.room(self.granted.receive_buffers[self.tp_rank], offset, size)
        memory = there.memory
        self._written = there
        if status is RequestStatus.HOST:
            copy = self.paused_requests.copy_of(self.req)
            self.serializer.copy_host(copy, begin, end, before, memory)
            if with_state and copy.state is not None:
                self.serializer.state_host(copy.state, memory)
        else:
            where = self._locations(status)[begin:end]
            state = RecurrentStates.location(self.req) if with_state else None
            self._copy = []
            if len(where):
                self.serializer.copy_out(where, before, memory, self._copy)
            if state is not None:
                self.serializer.state_out(state, memory, self._copy)

    def is_written(self) -> bool | None:
        """Whether the piece that is copied beside the decoding is in the slot on every rank; None
        while that is not known."""
        if self.sending is not None:
            return None if self.rate == UNDER_WAY else self.rate > FAILED
        return True if self.writing is None else self.writing.complete

    def word(self) -> float:
        """This rank's word on the piece that goes over a network: it is sent once it is copied."""
        write = self._written
        if self._problem is not None or write is None:
            return FAILED
        if self.serializer.copies.deferred:
            copied = True if self.writing is None else self._copied(self.writing)
        else:
            copied = self._copy is None or self.serializer.wait(self._copy)
            self._copy = None
        if copied is None:
            return UNDER_WAY
        if copied:
            write.begin()
            copied = write.query()
        if copied is None:
            return UNDER_WAY
        if not copied:
            self._problem = write.problem or "reading KV failed"
            return FAILED
        return max(2 * FAILED, (self.sending or 0) / max(1e-9, write.seconds))

    @staticmethod
    def _copied(transfer: Transfer) -> bool | None:
        return transfer.query() if transfer.complete is None else transfer.complete

    def give_up_write(self) -> None:
        """Nothing of the piece is sent any more."""
        if self._written is not None:
            self._written.abandon()

    def give_up_unbegun(self) -> None:
        """Do not begin to send the piece."""
        if self._written is not None and not self._written.begun:
            self._written.abandon()

    @property
    def problem(self) -> str:
        """Why the piece has failed."""
        return self._problem or "another rank"

    @property
    def is_at_rest(self) -> bool:
        """Whether this rank has nothing to do with the piece any more."""
        return self._written is None or self._written.at_rest

    def sent(self, complete: bool) -> None:
        """The piece that was copied beside the decoding has been waited for."""
        if complete and self._written is not None:
            self.bytes_sent += self._written.memory.nbytes
        self.writing = self._copy = self._written = self.sending = None

    def written(self) -> str | None:
        """Wait for what `write` began; None if it is in the slot, else why it is not."""
        if self._copy is not None and not self.serializer.wait(self._copy):
            self._problem = "reading KV failed"
        if self._problem is None and self._written is not None:
            self.bytes_sent += self._written.memory.nbytes
        self._copy = self._written = None
        return self._problem

    def _locations(self, status: RequestStatus) -> torch.Tensor:
        if status is RequestStatus.RESIDENT:
            return self.paused_requests.locations_of(self.req)
        return self.paused_requests.pool.locations(self.req)

    def take_out(self, running: ScheduleBatch, unline: Callable[[Req], None]) -> None:
        """Out of the batch, or out of the line of those who come back into it."""
        paused = self.paused_requests.status_of(self.req)
        if paused is None:
            self.paused_requests.leave([self.req], running, lambda _: KVTier.RESIDENT)
        self.paused_requests.begin_migration(self.req)
        if paused in KEPT:
            unline(self.req)

    def put_back(self) -> RequestStatus | None:
        """It stays. Returns where it waits to be brought back; None if it is still leaving the
        batch, waits to be prefilled already, or has ended."""
        paused = self.paused_requests.status_of(self.req)
        self.paused_requests.end_migration(self.req)
        # Its KV was dropped after the Handover.
        if paused is PauseStatus.DROPPED and not self.req.finished():
            return RequestStatus.WAITING
        return KEPT.get(paused)

    def let_go(self) -> None:
        """Give back everything it holds here."""
        self.paused_requests.end_migration(self.req)
        self.paused_requests.let_go(self.req)


def find(rid: str, scheduler: SchedulerProtocol, paused_requests: PausedRequests) -> Req | None:
    """The live request of that name that runs or is paused."""
    paused = paused_requests.in_status(
        PauseStatus.LEAVING, PauseStatus.RESIDENT, PauseStatus.HOST, PauseStatus.ARRIVING
    )
    live = (*scheduler.running_batch.reqs, *paused)
    return next((r for r in live if r.rid == rid and not r.finished()), None)
