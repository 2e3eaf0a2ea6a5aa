"""Why a request waited or was paused, and when: metrics, its timeline, and one line of JSON per
decision if asked for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import Any

from pascal_sglang.engine.observability.metrics import DecisionMetrics
from pascal_sglang.engine.observability.phases import timeline_of
from pascal_sglang.policy.kv_tier import Rung
from pascal_sglang.policy.ranking import Moment, Order, Tuning
from pascal_sglang.policy.request import Member

logger = logging.getLogger("pascal_sglang.decisions")


class Journal:
    """Takes note of every decision about a user's request.

    metrics: None on ranks that do not report.
    counts: decisions by kind and class, for the status route.
    """

    def __init__(self, order: Order, tuning: Tuning, *, log: bool) -> None:
        self.order = order
        self.tuning = tuning
        self.log = log
        if log:
            logger.setLevel(logging.INFO)  # Asked for, whatever --log-level says of the rest.
        self.metrics: DecisionMetrics | None = None
        self.counts: Counter[str] = Counter()
        self._last_blocked: tuple[Member, str] | None = None

    def class_of(self, member: Member, moment: Moment) -> str:
        return self.order.names[self.order.rank(member, moment, self.tuning)[0]]

    def paused(self, member: Member, moment: Moment, why: str) -> None:
        """`member` leaves the batch: `growth` (the next steps would not fit), `displaced` (for a
        better one), `memory` (SGLang found no KV for this very step) or `chaos` (a test)."""
        timeline_of(member.handle).stopped("paused", moment.now)
        if member.internal:
            return
        name = self.class_of(member, moment)
        self.counts[f"pause:{name}:{why}"] += 1
        if self.metrics is not None:
            self.metrics.paused(name, why)
        self._write("pause", member, moment, name, why=why)

    def left_device(self, member: Member, rung: Rung, moment: Moment) -> None:
        """The KV of a paused request is now on `rung`."""
        if member.internal:
            return
        if self.metrics is not None:
            self.metrics.left_device(rung, member.kv_tokens)
        self._write("rung", member, moment, self.class_of(member, moment), rung=rung.value)

    def started(self, member: Member, moment: Moment) -> None:
        """`member`, still in its place of waiting, is admitted or resumed."""
        timeline_of(member.handle).went_on(moment.now)
        if member.internal:
            return
        name = self.class_of(member, moment)
        waited_s = max(0.0, moment.now - member.since) if member.since else 0.0
        self.counts[f"start:{name}:{member.place.value}"] += 1
        if self.metrics is not None:
            self.metrics.started(name, member.place.value, waited_s)
        self._write(
            "start",
            member,
            moment,
            name,
            place=member.place.value,
            waited_passes=moment.pass_no - member.since_pass,
            waited_s=round(waited_s, 6),
        )

    def blocked(self, member: Member | None, lacks: str, moment: Moment) -> None:
        """The best request in line could not start; written once per request and reason."""
        if member is None or member.internal:
            return
        if self.metrics is not None:
            self.metrics.blocked(lacks)
        if self._last_blocked != (member, lacks):
            self._last_blocked = (member, lacks)
            self._write("blocked", member, moment, self.class_of(member, moment), lacks=lacks)

    def _write(
        self, decision: str, member: Member, moment: Moment, name: str, **more: object
    ) -> None:
        if not self.log:
            return
        line: dict[str, Any] = {
            "decision": decision,
            "pass": moment.pass_no,
            "rid": getattr(member.handle, "rid", member.seq),
            "class": name,
            "phase": member.phase.value,
            "phase_tokens": member.phase_tokens,
            "kv_tokens": member.kv_tokens,
            **more,
        }
        logger.info(json.dumps(line))
