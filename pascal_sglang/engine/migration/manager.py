"""Moves of requests between this instance and others.

Both sides' states are in `cluster.migration_source` and `cluster.migration_target`. Every TP rank
takes the same messages in the same pass and reads the same clock, so that all ranks do the same;
only rank 0 speaks.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.codec import BadMessage, unpack
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.engine.migration.control_receiver import ControlBatch, Rank0Sender
from pascal_sglang.engine.migration.incoming import IncomingMigrations
from pascal_sglang.engine.migration.outgoing import OutgoingMigrations
from pascal_sglang.engine.migration.request_snapshot import why_not_migratable
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.observability.tracing import span
from pascal_sglang.engine.req_attributes import state_of, timeline_of
from pascal_sglang.engine.request_states import RequestStates, remaining_of
from pascal_sglang.engine.tp_ranks import ERRORS_LOGGED, catch_on_all_ranks
from pascal_sglang.instances import instance_count, own_instance
from pascal_sglang.policy.prefix_namespace import Namespace
from pascal_sglang.policy.running_mean import running_mean
from pascal_sglang.policy.timeline import Phase

logger = logging.getLogger(__name__)

TO_SOURCE = (
    messages.ReserveGranted,
    messages.ReserveRefused,
    messages.ChunkAck,
    messages.CommitAck,
    messages.WriteQuery,
)
TO_TARGET = (messages.KVChunk, messages.Handover, messages.MigrationCancelled)


@dataclass(kw_only=True, slots=True, eq=False)
class Migrations:
    """All migrations of one scheduler."""

    states: RequestStates
    outgoing_migrations: OutgoingMigrations
    incoming_migrations: IncomingMigrations
    control_sender: Rank0Sender
    # For tests: the chance per pass that an answer asks to move again.
    force_migration: float
    # Whether requests may move at the end of their thinking; otherwise only off an instance that is
    # drained.
    moves_at_boundary: bool = True
    # Requests that ended their reasoning and cannot move, by reason.
    unmovable: Counter[str] = field(default_factory=Counter)
    # Malformed messages, by reason.
    rejected: Counter[str] = field(default_factory=Counter)
    # Seconds without a token, of the last migrations to here.
    blocked_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    # Tokens that an answer has here, on average; None before the first.
    answer_tokens: float | None = None
    metrics: MigrationMetrics | None = None
    # Answers the controller which requests live here.
    locate: Callable[[messages.LocationQuery], None] = lambda query: None
    # Lets the instance end, which was told to.
    end: Callable[[messages.MayEnd], None] = lambda word: None
    # Told of requests that went to another instance though this one has most of their prompts.
    elsewhere: Callable[[array[int], Namespace], None] = lambda ids, namespace: None
    # Told of each request that goes on elsewhere.
    left: Callable[[Req], None] = lambda req: None
    _dice: random.Random = field(default_factory=lambda: random.Random(0))
    _dp_rank: int = field(default_factory=own_instance)
    _instances: int = field(default_factory=instance_count)

    def __post_init__(self) -> None:
        self.outgoing_migrations.left = self._left

    @property
    def reserved_tokens(self) -> int:
        """KV entries that no request owns yet."""
        return self.incoming_migrations.receive_buffer.reserved

    @property
    def reserved_windows(self) -> int:
        """The same of entries of sliding windows."""
        return self.incoming_migrations.receive_buffer.reserved_windows

    def is_empty(self) -> bool:
        return not self.outgoing_migrations.holds_requests and self.incoming_migrations.is_idle

    def holds_no_kv(self) -> bool:
        """Whether all KV may be dropped; that of requests on their way out is the paused
        requests'."""
        return not self.incoming_migrations.under_way

    def give_up(self, why: str) -> None:
        """End every move that can still be ended: the request stays at its source."""
        self.outgoing_migrations.give_up(why)
        self.incoming_migrations.give_up(why)

    def defers_prefill(self, prefill_waits: bool) -> bool:
        """Whether the prefill of this pass, if there is one, stands back for a move."""
        incoming_migrations = self.incoming_migrations
        moving = bool(
            self.outgoing_migrations.under_way
            or incoming_migrations.under_way
            or incoming_migrations.arrived
        )
        pass_no = self.states.pass_info.pass_no
        return incoming_migrations.prefill_gate.defers(
            pass_no, prefill_waits=prefill_waits, moving=moving
        )

    def hear(self, control_batch: ControlBatch) -> None:
        """Take in what has come since the last pass."""
        for data in control_batch.messages:
            try:
                sender, message = unpack(data, self._instances)
            except BadMessage as error:
                self._reject(str(error))
                continue
            failure = catch_on_all_ranks(
                self.states.scheduler, partial(self._take_in, sender, message, control_batch.now)
            )
            if failure is not None:
                self._reject("failed")
                if self.rejected["failed"] <= ERRORS_LOGGED:
                    logger.error("pascal_sglang: a message about a move failed", exc_info=failure)

    def _take_in(self, sender: int, message: Any, now: float) -> None:
        if isinstance(message, messages.MigrateCommand):
            self.outgoing_migrations.ordered(message, now)
        elif isinstance(message, messages.InstanceDown):
            self.outgoing_migrations.died(message.dp_rank)
            self.incoming_migrations.died(message.dp_rank)
        elif isinstance(message, messages.ReserveRequest):
            self.incoming_migrations.asked(sender, message, now)
        elif isinstance(message, messages.ReceiveBuffers):
            self.outgoing_migrations.open_peer(sender, message.receive_buffers)
        elif isinstance(message, TO_SOURCE):
            self.outgoing_migrations.hear(sender, message, now)
        elif isinstance(message, TO_TARGET):
            self.incoming_migrations.hear(sender, message, now)
        elif isinstance(message, messages.LocationQuery):
            self.locate(message)
        elif isinstance(message, messages.MayEnd):
            self.end(message)
        elif isinstance(message, messages.TurnElsewhere):
            self.elsewhere(*message.prompt())
        else:
            self._reject("not for an instance")

    def report_to(self, metrics: MigrationMetrics) -> None:
        self.metrics = self.outgoing_migrations.metrics = self.incoming_migrations.metrics = metrics

    def _reject(self, reason: str) -> None:
        self.rejected[reason] += 1
        if self.metrics is not None:
            self.metrics.rejected(reason)

    def passed(self, seconds: float | None) -> None:
        """A pass is over, which took so long; None where that says nothing of a step's length."""
        self.outgoing_migrations.pace.passed(seconds)

    def step(self, running: ScheduleBatch) -> None:
        """Once per pass, before the plan."""
        now = self.states.pass_info.now
        if self.outgoing_migrations.under_way or self.outgoing_migrations.closing:
            self.outgoing_migrations.step(running, now)
        if (
            not self.incoming_migrations.is_idle
            or self.incoming_migrations.receive_buffer.slots.in_doubt
        ):
            self.incoming_migrations.step(now)
        if self.force_migration:
            for req in running.reqs:
                if (
                    state_of(req).phase is Phase.ANSWERING
                    and self._dice.random() < self.force_migration
                ):
                    self.reasoning_ended(req)

    def reasoning_ended(self, req: Req) -> None:
        """The request has just ended its reasoning: ask the controller where it goes on."""
        if not self.moves_at_boundary:
            return
        reason = why_not_migratable(req)
        if reason is not None:
            self.unmovable[reason] += 1
            if self.metrics is not None:
                self.metrics.unmovable(reason)
            return
        kv_tokens = len(req.origin_input_ids) + len(req.output_ids)
        remaining = remaining_of(req, state_of(req))
        likely = remaining if self.answer_tokens is None else int(self.answer_tokens)
        outgoing = self.outgoing_migrations
        passes = outgoing.pace.passes(kv_tokens, outgoing.moves + 1)
        self.control_sender.send(
            CONTROLLER,
            [
                messages.ReasoningEnded(
                    self._dp_rank, req.rid, kv_tokens, remaining, min(remaining, likely), passes
                )
            ],
        )

    def observe(self, live: Sequence[Req], over: Sequence[Req], now: float) -> None:
        """The requests `live` took part in a pass, whose tokens leave `now`, and `over` of them
        ended in it."""
        arrived = self.incoming_migrations.arrived
        for req in [req for req in live if req in arrived] if arrived else ():
            blocked_s = max(0.0, now - arrived.pop(req))
            self.blocked_s.append(blocked_s)
            span(req, "migration_blocking", now - blocked_s, now)
            if self.metrics is not None:
                self.metrics.blocked(blocked_s)
        for req in over:
            if spoke := timeline_of(req).answer_tokens:
                self.answer_tokens = running_mean(self.answer_tokens, spoke)

    def gone(self, req: Req) -> None:
        """The request has ended here, or moved on, without another token."""
        self.incoming_migrations.arrived.pop(req, None)

    def _left(self, req: Req) -> None:
        self.gone(req)
        self.left(req)

    def aborted(self, rid: str, matches: Callable[[str], bool]) -> None:
        """An abort has come, before it is looked for among the requests here."""
        self.outgoing_migrations.aborted(matches)
        self.incoming_migrations.aborted(rid, matches, self.states.pass_info.now)

    def moving(self) -> set[str]:
        """The ids of the requests on their way out of here or in."""
        both = (self.outgoing_migrations.under_way, self.incoming_migrations.under_way)
        return {each.rid for under_way in both for each in under_way.values()}

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`."""
        slots = self.incoming_migrations.receive_buffer.slots
        return {
            "out": [
                {"rid": out.rid, "to": out.target, "state": out.state.value}
                for out in self.outgoing_migrations.under_way.values()
            ],
            "in": [
                {"rid": each.rid, "from": each.sender, "state": each.state.value}
                for each in self.incoming_migrations.under_way.values()
            ],
            "slots": {"free": slots.free, "in_doubt": slots.in_doubt},
            "outgoing": dict(self.outgoing_migrations.counts),
            "incoming": dict(self.incoming_migrations.counts),
            "unmovable": dict(self.unmovable),
            "rejected": dict(self.rejected),
            "awaiting_token": len(self.incoming_migrations.arrived),
            "bytes": self.outgoing_migrations.bytes_sent,
            "blocked_s": list(self.blocked_s),
        }
