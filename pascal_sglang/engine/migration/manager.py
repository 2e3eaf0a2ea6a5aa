"""Moves of requests between this instance and others.

Both sides' states are in `cluster.source` and `cluster.target`. Every TP rank takes the same
messages in the same pass and reads the same clock, so that all ranks do the same; only rank 0
speaks.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster import messages, orders
from pascal_sglang.cluster.codec import BadMessage, unpack
from pascal_sglang.cluster.control_channel import CONTROLLER
from pascal_sglang.engine.migration.control_receiver import Letters, Voice
from pascal_sglang.engine.migration.incoming import Arrivals
from pascal_sglang.engine.migration.outgoing import Departures
from pascal_sglang.engine.migration.request_snapshot import why_not_movable
from pascal_sglang.engine.observability.migration_metrics import MoveMetrics
from pascal_sglang.engine.plan_executor import ERRORS_LOGGED, Governor
from pascal_sglang.engine.request_states import member_of, remaining_of
from pascal_sglang.engine.tp_ranks import catch_on_all_ranks
from pascal_sglang.policy.timeline import Phase

logger = logging.getLogger(__name__)

TO_SOURCE = (
    messages.Granted,
    messages.Refused,
    messages.Got,
    messages.Mine,
    messages.WriteQuery,
)
TO_TARGET = (messages.Chunk, messages.Handover, messages.Cancelled)
# Passes that a move takes besides one per window.
PASSES = 4


class Moves:
    """All moves of one scheduler.

    stayed: requests that reached their boundary and cannot move, by reason. rejected: letters that
    were no messages, by reason. blocked_s: seconds without a token, of the last moves to here.
    """

    def __init__(
        self,
        governor: Governor,
        departures: Departures,
        arrivals: Arrivals,
        voice: Voice,
        flood: float,
    ) -> None:
        """flood: for tests: the chance per pass that an answer asks to move again."""
        self.governor, self.departures, self.arrivals = governor, departures, arrivals
        self.voice = voice
        self.departures.left = self.gone
        self.stayed: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.blocked_s: deque[float] = deque(maxlen=1024)
        # Tokens that an answer has here, on average; None before the first.
        self.answer_tokens: float | None = None
        self.metrics: MoveMetrics | None = None
        # Answers the controller which requests live here.
        self.locate: Callable[[orders.LocationQuery], None] = lambda query: None
        self._flood = flood
        self._dice = random.Random(0)
        self._dp_rank, self._instances = get_parallel().dp_rank or 0, get_parallel().dp_size

    @property
    def reserved_tokens(self) -> int:
        """KV entries that no request owns yet."""
        return self.arrivals.landing.reserved

    def is_empty(self) -> bool:
        return not self.departures.holds_requests and self.arrivals.is_idle

    def holds_no_kv(self) -> bool:
        """Whether all KV may be dropped; that of requests on their way out is the ladder's."""
        return not self.arrivals.under_way

    def give_up(self, why: str) -> None:
        """End every move that can still be ended: the request stays at its source."""
        self.departures.give_up(why)
        self.arrivals.give_up(why)

    def defers_prefill(self, prefill_waits: bool) -> bool:
        """Whether the prefill of this pass, if there is one, stands back for a move."""
        arrivals = self.arrivals
        moving = bool(self.departures.under_way or arrivals.under_way or arrivals.arrived)
        pass_no = self.governor.moment.pass_no
        return arrivals.clearance.defers(pass_no, prefill_waits=prefill_waits, moving=moving)

    def hear(self, letters: Letters) -> None:
        """Take in what has come since the last pass."""
        for letter in letters.letters:
            try:
                sender, message = unpack(letter, self._instances)
            except BadMessage as error:
                self._reject(str(error))
                continue
            error = catch_on_all_ranks(
                self.governor.scheduler, partial(self._take_in, sender, message, letters.now)
            )
            if error is not None:
                self._reject("failed")
                if self.rejected["failed"] <= ERRORS_LOGGED:
                    logger.error("pascal_sglang: a message about a move failed", exc_info=error)

    def _take_in(self, sender: int, message: Any, now: float) -> None:
        if isinstance(message, orders.Order):
            self.departures.ordered(message, now)
        elif isinstance(message, orders.Died):
            self.departures.died(message.dp_rank)
            self.arrivals.died(message.dp_rank)
        elif isinstance(message, messages.Ask):
            self.arrivals.asked(sender, message, now)
        elif isinstance(message, messages.Landings):
            self.departures.open_peer(message.landings)
        elif isinstance(message, TO_SOURCE):
            self.departures.hear(sender, message, now)
        elif isinstance(message, TO_TARGET):
            self.arrivals.hear(sender, message, now)
        elif isinstance(message, orders.LocationQuery):
            self.locate(message)
        else:
            self._reject("not for an instance")

    def report_to(self, metrics: MoveMetrics) -> None:
        self.metrics = self.departures.metrics = self.arrivals.metrics = metrics

    def _reject(self, reason: str) -> None:
        self.rejected[reason] += 1
        if self.metrics is not None:
            self.metrics.rejected(reason)

    def step(self, running: ScheduleBatch) -> None:
        """Once per pass, before the plan."""
        now = self.governor.moment.now
        if self.departures.under_way:
            self.departures.step(running, now)
        if not self.arrivals.is_idle or self.arrivals.landing.windows.in_doubt:
            self.arrivals.step(now)
        if self._flood:
            for req in running.reqs:
                if member_of(req).phase is Phase.ANSWERING and self._dice.random() < self._flood:
                    self.crossed(req)

    def crossed(self, req: Req) -> None:
        """The request has just ended its thinking: ask the controller where it goes on."""
        reason = why_not_movable(req)
        if reason is not None:
            self.stayed[reason] += 1
            if self.metrics is not None:
                self.metrics.stayed(reason)
            return
        kv_tokens = len(req.origin_input_ids) + len(req.output_ids)
        remaining = remaining_of(req, member_of(req))
        likely = remaining if self.answer_tokens is None else int(self.answer_tokens)
        passes = PASSES + kv_tokens // self.departures.window
        self.voice.say(
            CONTROLLER,
            [
                orders.Boundary(
                    self._dp_rank, req.rid, kv_tokens, remaining, min(remaining, likely), passes
                )
            ],
        )

    def observe(self, req: Req) -> None:
        """The request may have produced a token."""
        since = self.arrivals.arrived.pop(req, None) if self.arrivals.arrived else None
        if since is not None:
            blocked_s = max(0.0, time.perf_counter() - since)
            self.blocked_s.append(blocked_s)
            if self.metrics is not None:
                self.metrics.blocked(blocked_s)
        if req.finished() and (spoke := member_of(req).pacer.delivered):
            before = self.answer_tokens
            self.answer_tokens = spoke if before is None else 0.9 * before + 0.1 * spoke

    def gone(self, req: Req) -> None:
        """The request has ended here, or moved on, without another token."""
        self.arrivals.arrived.pop(req, None)

    def aborted(self, rid: str, matches: Callable[[str], bool]) -> None:
        """An abort has come, before it is looked for among the requests here."""
        self.departures.aborted(matches)
        self.arrivals.aborted(rid, matches, self.governor.moment.now)

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`."""
        windows = self.arrivals.landing.windows
        return {
            "out": [
                {"rid": out.req.rid, "to": out.target, "state": out.source.state.value}
                for out in self.departures.under_way.values()
                if out.source is not None
            ],
            "in": [
                {"rid": target.rid, "from": incoming.sender, "state": target.state.value}
                for incoming in self.arrivals.under_way.values()
                if (target := incoming.target) is not None
            ],
            "windows": {"free": windows.free, "in_doubt": windows.in_doubt},
            "departures": dict(self.departures.counts),
            "arrivals": dict(self.arrivals.counts),
            "stayed": dict(self.stayed),
            "rejected": dict(self.rejected),
            "awaiting_token": len(self.arrivals.arrived),
            "bytes": self.departures.bytes_sent,
            "blocked_s": list(self.blocked_s),
        }
