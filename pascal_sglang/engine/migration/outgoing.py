"""The source's side of moves (`cluster.source`), carried out on the engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.migration_source import OPEN, OVER, MigrationSource, SourceState, Terms
from pascal_sglang.cluster.transport import Transport
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.migration.control_receiver import Rank0Sender
from pascal_sglang.engine.migration.outgoing_migration import OutgoingMigration, find
from pascal_sglang.engine.migration.prefill_gate import PrefillGate
from pascal_sglang.engine.migration.request_snapshot import export_state, why_not_migratable
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.request_states import RequestStates, remaining_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.policy.request import RequestStatus

logger = logging.getLogger(__name__)

# Tokens that a request may gain while it moves, beyond one per slot.
GROWTH = 64


class OutgoingMigrations:
    """Moves from here. counts: how they ended, `moved` or `kept:<why>`. bytes_sent: by this
    rank."""

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        states: RequestStates,
        terms: Terms,
        transport: Transport,
        kv: KVSerializer,
        slot_tokens: int,
        control_sender: Rank0Sender,
        prefill_gate: PrefillGate,
    ) -> None:
        """slot_tokens: KV entries that go between two decode steps."""
        self.scheduler, self.states = scheduler, states
        self.paused_requests = states.paused_requests
        self.terms, self.transport, self.kv, self.slot_tokens = terms, transport, kv, slot_tokens
        self.control_sender, self.prefill_gate = control_sender, prefill_gate
        self.under_way: dict[str, OutgoingMigration] = {}
        self.counts: Counter[str] = Counter()
        self.bytes_sent = 0
        self.metrics: MigrationMetrics | None = None
        # Told of each request that has left for good.
        self.left: Callable[[Req], None] = lambda req: None
        self._dp_rank, self._tp_rank = get_parallel().dp_rank or 0, get_parallel().tp_rank
        self._running: ScheduleBatch | None = None

    def open_peer(self, receive_buffers: Sequence[str]) -> None:
        """Open and pin another instance's receive buffer; `receive_buffers` are addresses, by TP
        rank."""
        if self._tp_rank < len(receive_buffers):
            self.transport.open_peer(receive_buffers[self._tp_rank])

    @property
    def holds_requests(self) -> bool:
        """Whether a request that is under way may still be this instance's."""
        return any(
            out.source is not None and out.source.state is not SourceState.REVOKING
            for out in self.under_way.values()
        )

    def ordered(self, order: messages.MigrateCommand, now: float) -> None:
        req = find(order.rid, self.scheduler, self.paused_requests)
        problem = "not here" if req is None else why_not_migratable(req)
        if self.scheduler._engine_paused:
            problem = "generation paused"
        if req is not None and any(out.req is req for out in self.under_way.values()):
            problem = "moves already"
        if req is None or problem is not None or order.target == self._dp_rank:
            self._report(order.migration, False, problem or "to itself")
            return
        held = len(req.origin_input_ids) + len(req.output_ids)
        growth = GROWTH + held // self.slot_tokens
        reserve = held + min(remaining_of(req, state_of(req)), growth) + 2
        out = OutgoingMigration(req, order.target, self.paused_requests, now)
        out.source = MigrationSource(
            order.migration,
            req.rid,
            self.terms,
            reserve,
            stop=lambda: self._stop(out),
            snapshot=lambda: export_state(req, out.blocked_since),
            resume=lambda: self._resume(out),
            release=out.let_go,
            lose=lambda: self._lose(out),
        )
        self.under_way[order.migration] = out
        self.control_sender.send(order.target, out.source.begin(now, self.kv.layout))

    def hear(self, sender: int, message: Message, now: float) -> None:
        out = self.under_way.get(message.migration)
        if out is None and isinstance(message, messages.WriteQuery):
            # What was under way has been waited for before the move was forgotten.
            self.control_sender.send(sender, [messages.MigrationCancelled(message.migration)])
        if out is None or out.target != sender or out.source is None:
            return
        if isinstance(message, messages.ReserveGranted):
            out.granted = message
        self._say(out, out.source.hear(message, now))
        self._close_if_over(message.migration)

    def step(self, running: ScheduleBatch, now: float) -> None:
        """Once per pass, before the plan: KV that is new goes out, and whoever is to stop leaves
        the running batch."""
        self._running = running
        alive = set(running.reqs)
        for migration, out in list(self.under_way.items()):
            assert out.source is not None
            self._advance(out, out.source, alive, now)
            self._say(out, out.source.tick(now))
            self._close_if_over(migration)

    def _say(self, out: OutgoingMigration, said: Sequence[Message]) -> None:
        """Tell the target. If the move is over, it gives the slot to others: nothing may be on
        its way there."""
        assert out.source is not None
        if out.source.state in OVER and out.unsaid is not None:
            self._wait(out)
        self.control_sender.send(out.target, said)

    def _advance(
        self, out: OutgoingMigration, source: MigrationSource, alive: set[Req], now: float
    ) -> None:
        if source.state not in OPEN:
            return
        why = "recompute" if out.status(alive) is RequestStatus.WAITING else None
        if out.req.finished() or out.req.to_finish is not None:
            why = "ended"
        if why is not None:
            # Its KV may have changed hands since a copy of it was begun.
            self._say(out, source.keep(why))
            return
        if (chunk := out.unsaid) is not None:
            self._say(out, [chunk] if self._wait(out) else source.unsent("transport"))
            if source.state not in OPEN:
                return
        if self._copy(out, source, alive, now) and source.state is SourceState.STOPPING:
            # Without overlap nothing of it is under way, and it stands still at once.
            self.states.finish_pauses()
            self._copy(out, source, alive, now)

    def _copy(
        self, out: OutgoingMigration, source: MigrationSource, alive: set[Req], now: float
    ) -> bool:
        """Send what can be sent; True if the request was told to stop by this."""
        status = out.status(alive)
        if status is None or status is RequestStatus.WAITING:
            return False
        before = source.state
        still = status is not RequestStatus.RUNNING and self.paused_requests.is_migrating(out.req)
        tokens = out.kv_tokens(
            status, status is RequestStatus.RUNNING and self.scheduler.enable_overlap
        )
        try:
            said = source.copy(now, tokens, still=still)
        except (TypeError, ValueError):
            logger.exception("pascal_sglang: the state of %s does not travel", out.req.rid)
            said = source.keep("state")
        for message in said:
            if isinstance(message, messages.KVChunk | messages.Handover):
                said = self._sent(out, source, message, status)
        self._say(out, said)
        return before is not source.state

    def _sent(
        self, out: OutgoingMigration, source: MigrationSource, message: Any, status: RequestStatus
    ) -> list[Message]:
        """Put the KV that `message` speaks of where the target finds it; what can be said now. The
        device copies a Chunk while the next step decodes. A Handover is little, and its reader
        waits for it."""
        chunk = message if isinstance(message, messages.KVChunk) else None
        end = message.kv_tokens if chunk is None else chunk.end
        out.write(message.begin, end, status, self.transport, self.kv, self._tp_rank)
        if chunk is not None and self.kv.copies.deferred and self.transport.direct:
            out.unsaid = chunk
            return []
        return [message] if self._wait(out) else source.unsent("transport")

    def _wait(self, out: OutgoingMigration) -> bool:
        """Whether the KV last written is in the slot, on every rank: rank 0 speaks for all."""
        out.unsaid = None
        problem = out.written(self.transport, self.kv)
        if problem is not None:
            logger.warning("pascal_sglang: %s stays: %s", out.req.rid, problem)
        return all_agree(self.scheduler, problem is None)

    def _stop(self, out: OutgoingMigration) -> None:
        assert self._running is not None
        if self.terms.live:
            # What it has produced last is told after the step that begins now.
            self.prefill_gate.ask(self.states.pass_info.pass_no, 1)
        out.stopped_at = self.states.pass_info.now
        timeline_of(out.req).stopped("moved", out.stopped_at)
        out.take_out(self._running, lambda req: self.states.ended(req))

    def _resume(self, out: OutgoingMigration) -> None:
        status = out.put_back()
        if status is None:
            return
        if out.aborted:
            out.let_go()
            self.scheduler.end_early(out.req, None)
        elif status is RequestStatus.WAITING:
            self.states.wait_again(out.req)
        else:
            self.states.stopped(out.req, status)

    def _lose(self, out: OutgoingMigration) -> None:
        out.let_go()
        assert out.source is not None
        died = out.source.state is SourceState.LOST
        how = "has died" if died else "does not answer"
        problem = f"The instance that the request moved to {how}."
        self.scheduler.end_early(out.req, None if out.aborted else problem)
        self._report(out.source.migration, False, out.source.why)

    def _close_if_over(self, migration: str) -> None:
        out = self.under_way[migration]
        source = out.source
        if source is None or source.state not in OVER:
            return
        del self.under_way[migration]
        self.bytes_sent += out.bytes_sent
        done = source.state is SourceState.DONE
        if done or source.state is SourceState.LOST:
            self.left(out.req)
        outcome = "moved" if done else f"kept:{source.why}"
        self.counts[outcome] += 1
        if self.metrics is not None:
            self.metrics.ended("out", outcome)
            self.metrics.sent(out.bytes_sent)
        self._report(migration, done, source.why)

    def _report(self, migration: str, done: bool, why: str) -> None:
        self.control_sender.send(
            CONTROLLER, [messages.MigrationEnded(self._dp_rank, migration, done, why)]
        )

    def give_up(self, why: str) -> None:
        """Every request that is not handed over stays."""
        for migration, out in list(self.under_way.items()):
            if out.source is not None:
                self._say(out, out.source.keep(why))
                self._close_if_over(migration)

    def aborted(self, matches: Callable[[str], bool]) -> None:
        """Requests are being aborted. One that was handed over is the target's to end, unless it
        comes back."""
        for migration, out in list(self.under_way.items()):
            if out.source is None or not matches(out.req.rid):
                continue
            out.aborted = out.source.state is SourceState.HANDED
            self._say(out, out.source.keep("aborted"))
            self._close_if_over(migration)

    def died(self, instance: int) -> None:
        """The instance is no more."""
        for migration, out in list(self.under_way.items()):
            if out.target == instance and out.source is not None:
                out.source.target_died()
                self._say(out, [])
                self._close_if_over(migration)
