"""The source's side of moves (`cluster.migration_source`), carried out on the engine."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang import clock
from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.cluster.messages import Message
from pascal_sglang.cluster.migration_pace import MigrationPace
from pascal_sglang.cluster.migration_source import OPEN, OVER, MigrationSource, SourceState, Terms
from pascal_sglang.cluster.transport import Transport
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.kv.transfers import Transfers
from pascal_sglang.engine.migration.control_receiver import Rank0Sender
from pascal_sglang.engine.migration.outgoing_kv import FAILED, UNDER_WAY, OutgoingKV, find
from pascal_sglang.engine.migration.outgoing_waiting import OutgoingWaiting
from pascal_sglang.engine.migration.prefill_gate import PrefillGate
from pascal_sglang.engine.migration.request_snapshot import export_state, why_not_migratable
from pascal_sglang.engine.migration.trace_link import end_trace
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.observability.tracing import span
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.request_states import RequestStates, remaining_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree, least
from pascal_sglang.instances import own_instance
from pascal_sglang.policy.request import RequestStatus

logger = logging.getLogger(__name__)

# How long bytes of a piece that was given up may still be on their way through a network, in
# seconds: its slot is not given to others until then.
QUIET_S = 10.0
# Of KV in host memory, which the scheduler's thread copies, all moves send so much in a pass while
# others decode: half a millisecond.
HOST_PIECE_BYTES = 4 << 20


@dataclass(kw_only=True, slots=True, eq=False)
class OutgoingMigration(MigrationSource):
    """One migration from here."""

    side: OutgoingMigrations
    # The instance it goes to.
    target: int
    kv: OutgoingKV
    # When it was ordered, in seconds.
    began: float = 0.0
    # Its client gave it up after the Handover.
    aborted: bool = False
    # When it was told to leave the batch, in seconds; 0 while it runs.
    stopped_at: float = 0.0
    # The pass in which its last piece was begun.
    served: int = 0

    @property
    def req(self) -> Req:
        return self.kv.req

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    def stop(self) -> None:
        side, states = self.side, self.side.states
        assert side.running is not None
        if self.terms.live and self.reserve:
            # What it has produced last is told after the step that begins now.
            side.prefill_gate.ask(states.pass_info.pass_no, 1)
        self.stopped_at = states.pass_info.now
        if self.req.output_ids:
            timeline_of(self.req).stopped("moved", self.stopped_at)
        self.kv.take_out(side.running, states.ended)

    def learn(self) -> None:
        self.side.pace.copied(self.passes, self.pieces)

    def snapshot(self) -> bytes:
        # When its last token left; for one that was paused, when the migration began to hold it.
        timeline = timeline_of(self.req)
        last_token = timeline.last_answer or timeline.reasoning_end or 0.0
        drafted = self.side.states.paused_requests.drafted(self.req) if self.reserve else None
        return export_state(self.req, max(self.stopped_at, last_token), drafted)

    def resume(self) -> None:
        status = self.kv.put_back()
        if status is None:
            return
        if self.aborted:
            self.kv.let_go()
            self.side.scheduler.end_early(self.req, None)
        elif status is RequestStatus.WAITING:
            self.side.states.wait_again(self.req)
        else:
            self.side.states.stopped(self.req, status)

    def release(self) -> None:
        self.kv.let_go()
        self.note("moved")
        end_trace(self.req)

    def note(self, outcome: str) -> None:
        """The migration is over: a span of the request's trace, where it has one."""
        span(self.req, "migration", self.began, clock.now(), to=self.target, outcome=outcome)

    def lose(self) -> None:
        self.kv.let_go()
        how = "has died" if self.state is SourceState.LOST else "does not answer"
        problem = f"The instance that the request moved to {how}."
        self.side.scheduler.end_early(self.req, None if self.aborted else problem)
        self.side.report(self.migration, False, self.why)


@dataclass(slots=True)
class Closing:
    """A move that is over while a network still carries a piece of it. Its target is told that
    nothing is written into the slot any more once that is so. Times in seconds."""

    target: int
    kv: OutgoingKV
    since: float
    # The piece has failed, and this instance has nothing to do with it any more.
    rest_since: float | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class OutgoingMigrations:
    """Migrations from here."""

    scheduler: SchedulerProtocol
    states: RequestStates
    terms: Terms
    transport: Transport
    kv: KVSerializer
    pace: MigrationPace
    control_sender: Rank0Sender
    prefill_gate: PrefillGate
    under_way: dict[str, OutgoingMigration] = field(default_factory=dict)
    closing: dict[str, Closing] = field(default_factory=dict)
    # How they ended: `moved` or `kept:<why>`.
    counts: Counter[str] = field(default_factory=Counter)
    # By this rank.
    bytes_sent: int = 0
    metrics: MigrationMetrics | None = None
    # Told of each request that has left for good.
    left: Callable[[Req], None] = lambda req: None
    # The running batch of this pass.
    running: ScheduleBatch | None = None
    # Addresses of other instances' receive buffers for this rank.
    _peers: dict[int, str] = field(default_factory=dict)
    _dp_rank: int = field(default_factory=own_instance)
    _tp_rank: int = field(default_factory=lambda: get_parallel().attn_tp_rank)

    @property
    def transfers(self) -> Transfers:
        return self.states.paused_requests.transfers

    def open_peer(self, instance: int, receive_buffers: Sequence[str]) -> None:
        """Open and pin another instance's receive buffer; `receive_buffers` are addresses, by TP
        rank."""
        if self._tp_rank < len(receive_buffers):
            self._peers[instance] = receive_buffers[self._tp_rank]
            self.transport.open_peer(self._peers[instance])

    @property
    def holds_requests(self) -> bool:
        """Whether a request that is under way may still be this instance's."""
        return any(out.state is not SourceState.REVOKING for out in self.under_way.values())

    @property
    def moves(self) -> int:
        """Moves whose KV is on its way, or may be soon."""
        return sum(out.state in OPEN and out.reserve > 0 for out in self.under_way.values())

    def ordered(self, order: messages.MigrateCommand, now: float) -> None:
        """The controller wants a request to go on elsewhere; where this instance is drained, one
        that waits, too."""
        drains = isinstance(order, messages.DrainCommand)
        req = find(order.rid, self.scheduler, self.states.paused_requests)
        without_kv = isinstance(order, messages.DrainCommand) and order.without_kv
        if req is None and drains:
            req = next((r for r in self.scheduler.waiting_queue if r.rid == order.rid), None)
            without_kv = req is not None
        problem = "not here" if req is None else why_not_migratable(req)
        if self.scheduler._engine_paused:
            problem = "generation paused"
        if req is not None and any(out.req is req for out in self.under_way.values()):
            problem = "moves already"
        if req is None or problem is not None or order.target == self._dp_rank:
            self.report(order.migration, False, problem or "to itself")
            return
        held = len(req.origin_input_ids) + len(req.output_ids)
        growth = self.pace.growth(held, self.moves + 1)
        reserve = held + min(remaining_of(req, state_of(req)), growth) + self.pace.spare
        parts: dict[str, Any] = {
            "req": req,
            "paused_requests": self.states.paused_requests,
            "transport": self.transport,
            "serializer": self.kv,
            "tp_rank": self._tp_rank,
        }
        kv: OutgoingKV
        if without_kv:
            reserve, kv = 0, OutgoingWaiting(scheduler=self.scheduler, **parts)
        else:
            kv = OutgoingKV(**parts)
        out = self.under_way[order.migration] = OutgoingMigration(
            migration=order.migration,
            rid=req.rid,
            terms=self.terms,
            reserve=reserve,
            spare=self.pace.spare,
            over_network=self.pace.network is not None,
            side=self,
            target=order.target,
            kv=kv,
            began=now,
        )
        # Its last token has no KV yet.
        windows = self.states.paused_requests.pool.windows
        before = 0 if windows is None or without_kv else windows.before(held - 1)
        self.control_sender.send(order.target, out.begin(now, self.kv.layout, before))

    def hear(self, sender: int, message: Message, now: float) -> None:
        out = self.under_way.get(message.migration)
        known = out is not None or message.migration in self.closing
        if not known and isinstance(message, messages.WriteQuery):
            # What was under way has been waited for before the move was forgotten.
            self.control_sender.send(sender, [messages.MigrationCancelled(message.migration)])
        if out is None or out.target != sender:
            return
        if isinstance(message, messages.ReserveGranted):
            out.kv.granted = message
        self._say(out, out.hear(message, now))
        self._close_if_over(message.migration)

    def step(self, running: ScheduleBatch, now: float) -> None:
        """Once per pass, before the plan: KV that is new goes out, and whoever is to stop leaves
        the running batch."""
        self.running = running
        alive = set(running.reqs)
        self._agree_on_sending()
        self._close(now)
        for out in self.under_way.values():
            self._look_at(out, alive, now)
        # Those that stand still first, then in turn: a network takes a few pieces at a time.
        in_turn = sorted(
            self.under_way.items(),
            key=lambda each: (each[1].state is not SourceState.STOPPING, each[1].served),
        )
        for migration, out in in_turn:
            self._advance(out, alive, now)
            self._say(out, out.tick(now))
            self._close_if_over(migration)

    def _agree_on_sending(self) -> None:
        """What the ranks know together of the pieces that go over a network."""
        both = [out.kv for out in self.under_way.values()]
        both += [closing.kv for closing in self.closing.values()]
        sending = [kv for kv in both if kv.sending is not None and kv.rate == UNDER_WAY]
        if sending:
            rates = least(self.scheduler, *(kv.word() for kv in sending))
            for kv, rate in zip(sending, rates, strict=True):
                kv.rate = rate

    def _close(self, now: float) -> None:
        """Tell the targets of moves that are over when nothing is on its way to them any more."""
        for migration, closing in list(self.closing.items()):
            kv = closing.kv
            if kv.rate == UNDER_WAY:
                if now - closing.since > self.terms.patience_s:
                    kv.give_up_write()
                    if self.pace.network is not None:
                        self.pace.network.failed()
                    closing.since = math.inf
                continue
            if kv.rate <= FAILED and closing.rest_since is None:
                if all_agree(self.scheduler, kv.is_at_rest):
                    closing.rest_since = now
                else:
                    kv.give_up_write()
            if kv.rate > FAILED or now - (closing.rest_since or now) > QUIET_S:
                del self.closing[migration]
                cancelled = messages.MigrationCancelled(migration)
                self.control_sender.send(closing.target, [cancelled])

    @property
    def _is_full(self) -> bool:
        """Whether the transport takes no more writes now, as far as all ranks know."""
        writes = self.transport.writes
        if writes is None:
            return False
        sending = sum(out.kv.sending is not None for out in self.under_way.values())
        sending += sum(closing.rest_since is None for closing in self.closing.values())
        return sending >= writes

    def _say(self, out: OutgoingMigration, said: Sequence[Message]) -> None:
        """Tell the target. If the move is over, it gives the slot to others: nothing may be on
        its way there."""
        if out.is_over and out.kv.sending is not None:
            self._leave_to_network(out)
            said = [each for each in said if not isinstance(each, messages.MigrationCancelled)]
        elif out.is_over and out.writing is not None:
            self._wait(out)
        if out.is_over:
            out.writing = None
        self.control_sender.send(out.target, said)

    def _leave_to_network(self, out: OutgoingMigration) -> None:
        """The move is over, and the network may still carry a piece of it."""
        if out.migration in self.closing:
            return
        if out.kv.writing is not None:  # What is read there may be given to others.
            self.transfers.finish(out.kv.writing)
        out.kv.give_up_unbegun()
        since = -math.inf if out.why == "timeout" else self.states.pass_info.now
        self.closing[out.migration] = Closing(out.target, out.kv, since)

    def _look_at(self, out: OutgoingMigration, alive: set[Req], now: float) -> None:
        """What has become of the request, and of the piece that is on its way."""
        if out.state not in OPEN:
            return
        why = "recompute" if out.kv.is_lost(alive) else None
        if out.req.finished() or out.req.to_finish is not None:
            why = "ended"
        if why is not None:
            # Its KV may have changed hands since a copy of it was begun.
            self._say(out, out.keep(why))
            return
        if out.writing is not None and out.kv.is_written() is not None:
            self._say(out, out.written(now) if self._wait(out) else out.unsent("transport"))

    def _advance(self, out: OutgoingMigration, alive: set[Req], now: float) -> None:
        if out.state not in OPEN:
            return
        if self._copy(out, alive, now) and out.state is SourceState.STOPPING:
            # Without overlap nothing of it is under way, and it stands still at once.
            self.states.finish_pauses()
            self._copy(out, alive, now)

    def _copy(self, out: OutgoingMigration, alive: set[Req], now: float) -> bool:
        """Send what can be sent; True if the request was told to stop by this."""
        status = out.kv.status(alive)
        if status is None or out.kv.is_lost(alive):
            return False
        before, runs = out.state, status is RequestStatus.RUNNING
        still = not runs and self.states.paused_requests.is_migrating(out.req)
        tokens = out.kv.tokens(status, runs and self.scheduler.enable_overlap)
        out.link_tokens = self._link_tokens(status, waits=not alive)
        try:
            before_tokens = out.kv.before(status, tokens)
            said = out.copy(tokens, still=still, before=before_tokens, room=not self._is_full)
        except (TypeError, ValueError, OverflowError):
            logger.exception("pascal_sglang: the state of %s does not travel", out.req.rid)
            said = out.keep("state")
        for message in said:
            if isinstance(message, messages.KVChunk | messages.Handover):
                said = self._sent(out, message, status, now)
        self._say(out, said)
        return before is not out.state

    def _link_tokens(self, status: RequestStatus, *, waits: bool) -> int | None:
        """What a piece has at most; None for no more than a window takes. waits: no request here
        decodes meanwhile."""
        link = self.pace.link_tokens(self.moves)
        if status is not RequestStatus.HOST or waits:
            return link
        most = max(1, HOST_PIECE_BYTES // self.kv.per_token // max(1, self.moves))
        return most if link is None else min(link, most)

    def _sent(
        self, out: OutgoingMigration, message: Any, status: RequestStatus, now: float
    ) -> list[Message]:
        """Put the KV that `message` speaks of where the target finds it; what can be said now. The
        device copies a KVChunk while the next steps decode. A Handover is little, and its reader
        waits for it. A network carries both while the scheduler goes on."""
        stopped = isinstance(message, messages.Handover)
        end = message.kv_tokens if stopped else message.end
        began = clock.now()
        beside = not self.transport.direct or (not stopped and self.kv.copies.deferred)
        out.kv.write(message.begin, end, message.before, status, stopped=stopped, beside=beside)
        out.served = self.states.pass_info.pass_no
        if beside and out.kv.is_written() is not True:
            return []
        if not self._wait(out, end - message.begin, began, stopped=stopped):
            return out.unsent("transport")
        return out.written(now)

    def _wait(
        self,
        out: OutgoingMigration,
        tokens: int = 0,
        began: float = 0.0,
        *,
        stopped: bool = False,
    ) -> bool:
        """Whether the KV last written is in the slot, on every rank: rank 0 speaks for all.
        tokens: those of a piece that is waited for since `began`, which says how fast they go, on
        the slowest rank. stopped: it is the last one."""
        if out.kv.sending is not None:
            return self._arrived(out)
        if out.kv.writing is not None:
            complete = out.kv.writing.complete
            sent = self.transfers.finish(out.kv.writing) if complete is None else complete
            out.kv.sent(sent)
            problem = None if sent else "reading KV failed"
        else:
            problem = out.kv.written()
            rate = tokens / max(1e-9, clock.now() - began) if problem is None else 0.0
            (rate,) = least(self.scheduler, rate if tokens else float(problem is None))
            sent = rate > 0
            self.pace.went(tokens, rate, stopped=stopped)
        if problem is not None:
            logger.warning("pascal_sglang: %s stays: %s", out.req.rid, problem)
        return sent

    def _arrived(self, out: OutgoingMigration) -> bool:
        """Whether the piece that a network carried is in the slot, on every rank."""
        kv, network = out.kv, self.pace.network
        tokens, sent = kv.sending or 0, kv.rate > FAILED
        if network is not None:
            if not sent:
                network.failed()
            elif tokens:
                network.went(tokens, tokens / kv.rate)
        if sent:
            kv.sent(True)
        else:
            logger.warning("pascal_sglang: %s stays: %s", out.req.rid, kv.problem)
        return sent

    def _close_if_over(self, migration: str) -> None:
        out = self.under_way[migration]
        if not out.is_over:
            return
        del self.under_way[migration]
        self.bytes_sent += out.kv.bytes_sent
        done = out.state is SourceState.DONE
        if done or out.state is SourceState.LOST:
            self.left(out.req)
        outcome = "moved" if done else f"kept:{out.why}"
        if not done:
            out.note(outcome)
        self.counts[outcome] += 1
        if self.metrics is not None:
            self.metrics.ended("out", outcome)
            self.metrics.sent(out.kv.bytes_sent)
        self.report(migration, done, out.why)

    def report(self, migration: str, done: bool, why: str) -> None:
        self.control_sender.send(
            CONTROLLER, [messages.MigrationEnded(self._dp_rank, migration, done, why)]
        )

    def give_up(self, why: str) -> None:
        """Every request that is not handed over stays."""
        for migration, out in list(self.under_way.items()):
            self._say(out, out.keep(why))
            self._close_if_over(migration)

    def aborted(self, matches: Callable[[str], bool]) -> None:
        """Requests are being aborted. One that was handed over is the target's to end, unless it
        comes back."""
        for migration, out in list(self.under_way.items()):
            if not matches(out.req.rid):
                continue
            out.aborted = out.state is SourceState.HANDED
            self._say(out, out.keep("aborted"))
            self._close_if_over(migration)

    def died(self, instance: int) -> None:
        """The instance is no more."""
        for migration, out in list(self.under_way.items()):
            if out.target == instance:
                out.target_died()
                self._say(out, [])
                self._close_if_over(migration)
        # What is still on its way there fails, and is waited for in `closing`.
        if instance in self._peers:
            self.transport.close_peer(self._peers.pop(instance))
