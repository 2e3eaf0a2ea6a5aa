"""The target's side of moves (`cluster.migration_target`), carried out on the engine."""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.migration_target import MigrationTarget, TargetState
from pascal_sglang.engine.capacity import CapacityView
from pascal_sglang.engine.kv.drafts import DraftState
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.control_receiver import Rank0Sender
from pascal_sglang.engine.migration.draft_rows import unpack
from pascal_sglang.engine.migration.grammar import restore_grammar
from pascal_sglang.engine.migration.prefill_gate import HANDOVER_PASSES, PrefillGate
from pascal_sglang.engine.migration.receive_buffer import ReceiveBuffer, Reservation
from pascal_sglang.engine.migration.recent_aborts import RecentAborts
from pascal_sglang.engine.migration.request_snapshot import (
    BadSnapshot,
    RequestSnapshot,
    import_state,
    on_this_clock,
    read_snapshot,
    restore_state,
)
from pascal_sglang.engine.migration.revoked import Revoked
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.instances import own_instance
from pascal_sglang.policy.request import RequestStatus

logger = logging.getLogger(__name__)

# Ended moves whose last word may have to be said again.
REMEMBERED = 4096


@dataclass(kw_only=True, slots=True, eq=False)
class IncomingMigration(MigrationTarget):
    """One migration to here."""

    side: IncomingMigrations
    reservation: Reservation
    # Its state, once that is here, and the request made of it.
    snapshot: RequestSnapshot | None = None
    req: Req | None = None
    drafted: DraftState | None = None
    # Where its KV is that the request has taken over (`ReceiveBuffer.keep`).
    kept: tuple[torch.Tensor, int] | None = None
    # The request, once it is this instance's.
    taken: weakref.ref[Req] | None = None

    @property
    def sender(self) -> int:
        """The instance it comes from."""
        return self.reservation.sender

    def fetch(self, begin: int, end: int, before: int, *, stopped: bool) -> bool:
        receive_buffer = self.side.receive_buffer
        return receive_buffer.fetch(self.reservation, begin, end, before, stopped=stopped)

    def has_read(self) -> bool | None:
        return self.side.receive_buffer.has_read(self.reservation)

    def problem(self, state: bytes, tokens: int) -> str | None:
        scheduler = self.side.scheduler
        try:
            read = read_snapshot(state, tokens, scheduler.max_req_len)
            self.snapshot = on_this_clock(read, self.heard)
            self.req = import_state(scheduler, self.snapshot)
            # Without KV there is none of a draft model either: it is prefilled with the rest.
            self.drafted = unpack(self.snapshot.drafted, scheduler) if tokens else None
        except BadSnapshot as error:
            return str(error)
        except (TypeError, ValueError, KeyError, AttributeError):
            logger.exception("pascal_sglang: a request cannot be continued here")
            return "state that cannot be continued"
        if self.tokens and not tokens:
            return "KV that does not come"
        if self.snapshot.grammar:
            restored = restore_grammar(self.req, scheduler.grammar_manager)
            if not all_agree(scheduler, restored):
                return "a grammar that is not ready here"
        return None

    def take(self, state: bytes, tokens: int) -> bool:
        taken = False
        try:
            self._take(tokens)
            taken = True
        except Exception:  # Whatever it is: the source still has the request, and goes on with it.
            logger.exception("pascal_sglang: a request that came could not be taken")
        taken = all_agree(self.side.scheduler, taken)
        if not taken:
            self._give_back(tokens)
        return taken

    def _take(self, tokens: int) -> None:
        req, snapshot, states = self.req, self.snapshot, self.side.states
        assert req is not None
        assert snapshot is not None
        states.arrived(req)
        restore_state(req, snapshot)
        self.kept = self.side.receive_buffer.keep(
            self.reservation, tokens, self.before, states.pass_info.now
        )
        if tokens:
            states.paused_requests.adopt(req, *self.kept, self.reservation.state, self.drafted)
            states.stopped(req, RequestStatus.RESIDENT)
        else:
            states.queue_again(req)
        if snapshot.output_ids:
            self.side.arrived[req] = snapshot.blocked_since
        self.taken = weakref.ref(req)

    def _give_back(self, tokens: int) -> None:
        """Undo what `_take` has done, wherever it failed."""
        req, side = self.req, self.side
        assert req is not None
        self.taken = None
        side.arrived.pop(req, None)
        if self.kept is None:
            self.drop()
            return
        if req in side.states.paused_requests.held():
            side.states.ended(req)
            side.states.paused_requests.let_go(req)
        elif tokens:
            side.receive_buffer.give_back(self.reservation, *self.kept)
        else:
            side.states.ended(req)
            if req in side.scheduler.waiting_queue:
                side.scheduler.waiting_queue.remove(req)

    def drop(self) -> None:
        now = self.side.states.pass_info.now
        self.side.receive_buffer.drop(self.reservation, self.why, now)

    def revoke(self) -> None:
        """The request was ended by its source, which waited in vain for this instance."""
        req = None if self.taken is None else self.taken()
        if req is not None and not req.finished():
            self.side.count("revoked")
            self.side.arrived.pop(req, None)
            self.side.revoked.add(req)

    def is_receiving(self) -> bool:
        return self.state is TargetState.RECEIVING


@dataclass(kw_only=True, slots=True, eq=False)
class IncomingMigrations:
    """Migrations to here."""

    scheduler: SchedulerProtocol
    states: RequestStates
    capacity: CapacityView
    terms: Terms
    receive_buffer: ReceiveBuffer
    # Addresses of this instance's receive buffers, by TP rank.
    receive_buffers: list[str]
    control_sender: Rank0Sender
    prefill_gate: PrefillGate
    under_way: dict[str, IncomingMigration] = field(default_factory=dict)
    # How they ended: `taken`, or why not.
    counts: Counter[str] = field(default_factory=Counter)
    # Requests that came and have not produced a token here yet, and when their last one left
    # elsewhere, in seconds.
    arrived: dict[Req, float] = field(default_factory=dict)
    metrics: MigrationMetrics | None = None
    revoked: Revoked = field(init=False)
    _past: OrderedDict[str, IncomingMigration] = field(default_factory=OrderedDict)
    _recent_aborts: RecentAborts = field(default_factory=RecentAborts)
    _dp_rank: int = field(default_factory=own_instance)

    def __post_init__(self) -> None:
        self.revoked = Revoked(scheduler=self.scheduler, states=self.states)

    def came_with(self, batch: ScheduleBatch) -> bool:
        """Whether somebody's first token here is among those of this step."""
        return bool(self.arrived) and any(req in self.arrived for req in batch.reqs)

    @property
    def is_idle(self) -> bool:
        return not (self.under_way or self.receive_buffer.closing)

    def asked(self, sender: int, ask: messages.ReserveRequest, now: float) -> None:
        if ask.migration in self.under_way or ask.migration in self._past:
            return
        problem = self._why_not(ask, now)
        reservation = None
        if problem is None:
            reservation = self.receive_buffer.reserve(ask.migration, sender, ask.tokens, ask.before)
        if reservation is None:
            why = problem or "full"
            self.count(why)
            self.control_sender.send(sender, [messages.ReserveRefused(ask.migration, why)])
            return
        self.under_way[ask.migration] = IncomingMigration(
            migration=ask.migration,
            rid=ask.rid,
            terms=self.terms,
            tokens=ask.tokens,
            before=reservation.before,
            heard=now,
            side=self,
            reservation=reservation,
        )
        offset, size = self.receive_buffer.offset(reservation), self.receive_buffer.slot_tokens
        self.control_sender.send(
            sender, [messages.ReserveGranted(ask.migration, self.receive_buffers, offset, size)]
        )

    def _why_not(self, ask: messages.ReserveRequest, now: float) -> str | None:
        if ask.layout != self.receive_buffer.kv.layout:
            return "another KV layout or other weights"
        if self.scheduler._engine_paused:
            return "generation paused"
        if self._recent_aborts.covers(ask.rid, now):
            return "aborted"
        if not self.receive_buffer.slots.free:
            return "busy"
        if ask.before > ask.tokens:
            return "a hole in the KV"
        if not ask.tokens:
            return None
        running = len(self.scheduler.running_batch.reqs) + self.states.paused_requests.count(
            PauseStatus.ARRIVING
        )
        pool = self.receive_buffer.pool
        tokens, growth = pool.in_pages(ask.tokens), pool.in_pages(running + 1)
        if pool.free_tokens - self.capacity.promised_tokens() - growth < tokens:
            return "full"
        before = self.receive_buffer.in_whole_pages(ask.before)
        if self.capacity.free_windows() - growth < tokens - before:
            return "no windows"
        lacks_state = pool.states is not None and pool.states.free < pool.states.for_row
        return "no states" if lacks_state else None

    def _close_if_over(self, migration: str) -> None:
        incoming = self.under_way.get(migration)
        if incoming is None or incoming.is_receiving():
            return
        del self.under_way[migration]
        taken = incoming.state is TargetState.OWNED
        self.count("taken" if taken else incoming.why)
        # The source says so too, unless it has died.
        self.control_sender.send(
            CONTROLLER, [messages.MigrationEnded(self._dp_rank, migration, taken, incoming.why)]
        )
        incoming.req = incoming.snapshot = incoming.drafted = incoming.kept = None
        reservation = incoming.reservation
        reservation.locations = reservation.locations[:0].clone()
        self._past[migration] = incoming
        while len(self._past) > REMEMBERED:
            self._past.popitem(last=False)

    def count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        if self.metrics is not None:
            self.metrics.ended("in", outcome)

    def hear(self, sender: int, message: Message, now: float) -> None:
        """A source's message about a move that is known here."""
        if isinstance(message, messages.MigrationCancelled):
            self.receive_buffer.through(message.migration, sender)
        incoming = self.under_way.get(message.migration) or self._past.get(message.migration)
        if incoming is None or incoming.sender != sender:
            return
        self.control_sender.send(sender, incoming.hear(message, now))
        if isinstance(message, messages.KVChunk) and message.last:
            self.prefill_gate.ask(self.states.pass_info.pass_no, HANDOVER_PASSES)
        self._close_if_over(message.migration)

    def step(self, now: float) -> None:
        """Once per pass."""
        self.receive_buffer.close(now)
        for sender, migration in self.receive_buffer.slots.tick(now):
            self.control_sender.send(sender, [messages.WriteQuery(migration)])
        for migration, incoming in list(self.under_way.items()):
            self.control_sender.send(incoming.sender, incoming.tick(now))
            self._close_if_over(migration)

    def give_up(self, why: str) -> None:
        """What has come so far is dropped; the requests stay where they are."""
        for migration, incoming in list(self.under_way.items()):
            self.control_sender.send(incoming.sender, incoming.give_up(why))
            self._close_if_over(migration)

    def aborted(self, rid: str, matches: Callable[[str], bool], now: float) -> None:
        """Requests are being aborted, whose names are or begin with `rid`; one of them may be on
        its way, or be about to set out."""
        for migration, incoming in list(self.under_way.items()):
            if matches(incoming.rid):
                self.control_sender.send(incoming.sender, incoming.give_up("aborted"))
                self._close_if_over(migration)
        if rid:
            self._recent_aborts.add(rid, now)

    def died(self, instance: int) -> None:
        """The instance is no more."""
        for migration, incoming in list(self.under_way.items()):
            if incoming.sender == instance:
                incoming.give_up("source died")
                self._close_if_over(migration)
        self.receive_buffer.died(instance, self.states.pass_info.now)
