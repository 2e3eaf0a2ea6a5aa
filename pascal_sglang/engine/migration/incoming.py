"""The target's side of moves (`cluster.target`), carried out on the engine."""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.migration_target import MigrationTarget, TargetState
from pascal_sglang.engine.capacity import CapacityView
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.migration.control_receiver import Rank0Sender
from pascal_sglang.engine.migration.prefill_gate import HANDOVER_PASSES, PrefillGate
from pascal_sglang.engine.migration.receive_buffer import IncomingMigration, ReceiveBuffer
from pascal_sglang.engine.migration.recent_aborts import RecentAborts
from pascal_sglang.engine.migration.request_snapshot import (
    import_state,
    problem_with,
    restore_state,
)
from pascal_sglang.engine.migration.revoked import Revoked
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.policy.request import RequestStatus

logger = logging.getLogger(__name__)

# Ended moves whose last word may have to be said again.
REMEMBERED = 4096


class IncomingMigrations:
    """Moves to here. counts: how they ended, `taken` or why not. arrived: requests that came and
    have not produced a token here yet, and when their last one left elsewhere, in seconds."""

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        states: RequestStates,
        capacity: CapacityView,
        terms: Terms,
        receive_buffer: ReceiveBuffer,
        receive_buffers: list[str],
        control_sender: Rank0Sender,
        prefill_gate: PrefillGate,
    ) -> None:
        """receive_buffers: addresses of this instance's receive buffers, by TP rank."""
        self.scheduler, self.states, self.capacity = scheduler, states, capacity
        self.terms = terms
        self.receive_buffer, self.receive_buffers, self.control_sender = (
            receive_buffer,
            receive_buffers,
            control_sender,
        )
        self.prefill_gate = prefill_gate
        self.under_way: dict[str, IncomingMigration] = {}
        self.counts: Counter[str] = Counter()
        self.arrived: dict[Req, float] = {}
        self.metrics: MigrationMetrics | None = None
        self._past: OrderedDict[str, IncomingMigration] = OrderedDict()
        self._recent_aborts = RecentAborts()
        self.revoked = Revoked(scheduler, states)
        self._dp_rank = get_parallel().dp_rank or 0

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
        incoming = None if problem else self.receive_buffer.reserve(sender, ask.tokens)
        if incoming is None:
            why = problem or "full"
            self._count(why)
            self.control_sender.send(sender, [messages.ReserveRefused(ask.migration, why)])
            return
        incoming.target = MigrationTarget(
            ask.migration,
            ask.rid,
            self.terms,
            ask.tokens,
            fetch=lambda begin, end: self._fetch(incoming, begin, end),
            take=lambda state, tokens: self._take(incoming, state, tokens),
            drop=lambda: self.receive_buffer.drop(incoming, self.states.pass_info.now),
            revoke=lambda: self._revoke(incoming),
            valid=lambda state, tokens: self._problem(incoming, state, tokens),
            heard=now,
        )
        self.under_way[ask.migration] = incoming
        offset, size = self.receive_buffer.offset(incoming), self.receive_buffer.slot_tokens
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
        running = len(self.scheduler.running_batch.reqs) + self.states.paused_requests.count(
            PauseStatus.ARRIVING
        )
        pool = self.receive_buffer.pool
        room = pool.free_tokens - self.capacity.promised_tokens() - pool.in_pages(running + 1)
        return None if room >= pool.in_pages(ask.tokens) else "full"

    def _fetch(self, incoming: IncomingMigration, begin: int, end: int) -> bool:
        return all_agree(self.scheduler, self.receive_buffer.fetch(incoming, begin, end))

    def _problem(
        self, incoming: IncomingMigration, state: dict[str, Any], tokens: int
    ) -> str | None:
        problem = problem_with(state, tokens, self.scheduler.max_req_len)
        if problem is not None:
            return problem
        try:
            incoming.req = import_state(self.scheduler, state)
        except (TypeError, ValueError, KeyError, AttributeError):
            logger.exception("pascal_sglang: a request cannot be continued here")
            return "state that cannot be continued"
        return None

    def _take(self, incoming: IncomingMigration, state: dict[str, Any], tokens: int) -> None:
        req = incoming.req
        locations = self.receive_buffer.keep(incoming, tokens, self.states.pass_info.now)
        self.states.arrived(req)
        restore_state(req, state)
        self.states.paused_requests.adopt(req, locations)
        self.states.stopped(req, RequestStatus.RESIDENT)
        self.arrived[req] = state["blocked_since"]
        incoming.taken = weakref.ref(req)

    def _revoke(self, incoming: IncomingMigration) -> None:
        """The request was ended by its source, which waited in vain for this instance."""
        req = None if incoming.taken is None else incoming.taken()
        if req is not None and not req.finished():
            self._count("revoked")
            self.arrived.pop(req, None)
            self.revoked.add(req)

    def _close_if_over(self, migration: str) -> None:
        incoming = self.under_way.get(migration)
        if incoming is None or incoming.target is None:
            return
        target = incoming.target
        if target.state is TargetState.RECEIVING:
            return
        del self.under_way[migration]
        taken = target.state is TargetState.OWNED
        self._count("taken" if taken else target.why)
        # The source says so too, unless it has died.
        self.control_sender.send(
            CONTROLLER, [messages.MigrationEnded(self._dp_rank, migration, taken, target.why)]
        )
        incoming.req, incoming.locations = None, incoming.locations[:0].clone()
        self._past[migration] = incoming
        while len(self._past) > REMEMBERED:
            self._past.popitem(last=False)

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        if self.metrics is not None:
            self.metrics.ended("in", outcome)

    def hear(self, sender: int, message: Message, now: float) -> None:
        """A source's message about a move that is known here."""
        if isinstance(message, messages.MigrationCancelled):
            self.receive_buffer.through(message.migration, sender)
        incoming = self.under_way.get(message.migration) or self._past.get(message.migration)
        if incoming is None or incoming.sender != sender or incoming.target is None:
            return
        said = incoming.target.hear(message, now)
        if incoming.reading is not None and incoming.target.state is TargetState.RECEIVING:
            # Said again or not, the source writes the next piece as soon as it hears this.
            incoming.unsaid = said
        else:
            self.control_sender.send(sender, said)
        if isinstance(message, messages.KVChunk) and message.last:
            self.prefill_gate.ask(self.states.pass_info.pass_no, HANDOVER_PASSES)
        self._close_if_over(message.migration)

    def step(self, now: float) -> None:
        """Once per pass."""
        if self.receive_buffer.closing:
            # Before rank 0 grants one again, the other ranks must be done with it too.
            all_agree(self.scheduler, self.receive_buffer.close(now))
        for sender, migration in self.receive_buffer.slots.tick(now):
            self.control_sender.send(sender, [messages.WriteQuery(migration)])
        for migration, incoming in list(self.under_way.items()):
            assert incoming.target is not None
            if incoming.reading is not None:
                done = all_agree(self.scheduler, self.receive_buffer.read(incoming))
                said = incoming.unsaid if done else incoming.target.give_up("transport")
                self.control_sender.send(incoming.sender, said)
            self.control_sender.send(incoming.sender, incoming.target.tick(now))
            self._close_if_over(migration)

    def give_up(self, why: str) -> None:
        """What has come so far is dropped; the requests stay where they are."""
        for migration, incoming in list(self.under_way.items()):
            if incoming.target is not None:
                self.control_sender.send(incoming.sender, incoming.target.give_up(why))
                self._close_if_over(migration)

    def aborted(self, rid: str, matches: Callable[[str], bool], now: float) -> None:
        """Requests are being aborted, whose names are or begin with `rid`; one of them may be on
        its way, or be about to set out."""
        for migration, incoming in list(self.under_way.items()):
            if incoming.target is not None and matches(incoming.target.rid):
                self.control_sender.send(incoming.sender, incoming.target.give_up("aborted"))
                self._close_if_over(migration)
        if rid:
            self._recent_aborts.add(rid, now)

    def died(self, instance: int) -> None:
        """The instance is no more."""
        for migration, incoming in list(self.under_way.items()):
            if incoming.sender == instance and incoming.target is not None:
                incoming.target.give_up("source died")
                self._close_if_over(migration)
        self.receive_buffer.died(instance, self.states.pass_info.now)
