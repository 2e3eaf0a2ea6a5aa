"""Why a request waited or was paused, and when: metrics, its timeline, spans of its trace, and one
line of JSON per decision if asked for, in SGLang's log or in a file."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import Any

from pascal_sglang import clock
from pascal_sglang.cluster.decision_file import DecisionFile
from pascal_sglang.engine.observability.metrics import DecisionMetrics
from pascal_sglang.engine.observability.tracing import span
from pascal_sglang.engine.req_attributes import timeline_of
from pascal_sglang.policy.kv_tier import KVTier
from pascal_sglang.policy.ranking import PassInfo, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState

logger = logging.getLogger("pascal_sglang.decisions")


class DecisionLog:
    """Takes note of every decision about a user's request.

    log: whether SGLang's log gets a line per decision.
    metrics, file: where else they go; None on ranks that do not report.
    traces: whether SGLang traces requests.
    counts: decisions by kind and class, for the status route.
    """

    def __init__(self, policy: Policy, tuning: Tuning, *, log: bool) -> None:
        self.retune(policy, tuning, log=log)
        self.metrics: DecisionMetrics | None = None
        self.file: DecisionFile | None = None
        self.traces = False
        self.counts: Counter[str] = Counter()
        self._last_blocked: tuple[RequestState, str] | None = None

    def retune(self, policy: Policy, tuning: Tuning, *, log: bool) -> None:
        """Name classes by this policy and these numbers from now on. log: whether to write."""
        self.policy = policy
        self.tuning = tuning
        self.log = log
        if log:
            logger.setLevel(logging.INFO)  # Asked for, whatever --log-level says of the rest.

    def class_of(self, state: RequestState, pass_info: PassInfo) -> str:
        policy = self.policy
        number = policy.rank(state, pass_info, self.tuning)[-2]
        if number == policy.reasoning_class:  # Classes that wait apart may share a rank.
            number = policy.priority_class(state, self.tuning)
        return policy.class_names[number]

    def paused(self, state: RequestState, pass_info: PassInfo, why: str) -> None:
        """`state` leaves the batch: `growth` (the next steps would not fit), `displaced` (for a
        better one), `memory` (SGLang found no KV for this very step) or `chaos` (a test)."""
        timeline_of(state.handle).stopped("paused", pass_info.now)
        if state.internal:
            return
        name = self.class_of(state, pass_info)
        if self.traces:
            state.handle.pascal_paused = why
        self.counts[f"pause:{name}:{why}"] += 1
        if self.metrics is not None:
            self.metrics.paused(name, why)
        self._write("pause", state, pass_info, name, why=why)

    def resumed(self, state: RequestState, began: float) -> None:
        """`state`, still in its place of waiting, is being brought back since `began`, in seconds;
        where copies overlap decoding, its copy has been begun."""
        if self.traces and not state.internal:
            span(state.handle, "resume", began, clock.now(), tier=state.status.value)

    def unpausable(self, reason: str) -> None:
        """A user's request arrived that is not paused, and why."""
        if self.metrics is not None:
            self.metrics.unpausable(reason)

    def left_device(self, state: RequestState, tier: KVTier, pass_info: PassInfo) -> None:
        """The KV of a paused request is now on `tier`."""
        if state.internal:
            return
        if self.traces and (why := state.handle.__dict__.pop("pascal_paused", None)) is not None:
            began = timeline_of(state.handle).breaks[-1].start
            about = {"why": why, "tier": tier.value, "kv_tokens": state.kv_tokens}
            span(state.handle, "pause", began, pass_info.now, **about)
        if self.metrics is not None:
            self.metrics.left_device(tier, state.kv_tokens)
        self._write("tier", state, pass_info, self.class_of(state, pass_info), tier=tier.value)

    def started(self, state: RequestState, pass_info: PassInfo) -> None:
        """`state`, still in its place of waiting, is admitted or resumed."""
        timeline_of(state.handle).went_on(pass_info.now)
        if state.internal:
            return
        name = self.class_of(state, pass_info)
        waited_s = max(0.0, pass_info.now - state.since) if state.since else 0.0
        if self.traces and state.since:
            about = {"class": name, "status": state.status.value, "phase": state.phase.value}
            span(state.handle, "wait", state.since, pass_info.now, **about)
        self.counts[f"start:{name}:{state.status.value}"] += 1
        if self.metrics is not None:
            self.metrics.started(name, state.status.value, waited_s)
        self._write(
            "start",
            state,
            pass_info,
            name,
            status=state.status.value,
            waited_passes=pass_info.pass_no - state.since_pass,
            waited_s=round(waited_s, 6),
        )

    def blocked(self, state: RequestState | None, shortage: str, pass_info: PassInfo) -> None:
        """The best request in the queue could not start; written once per request and reason."""
        if state is None or state.internal:
            return
        if self.metrics is not None:
            self.metrics.blocked(shortage)
        if self._last_blocked != (state, shortage):
            self._last_blocked = (state, shortage)
            self._write(
                "blocked", state, pass_info, self.class_of(state, pass_info), shortage=shortage
            )

    def _write(
        self, decision: str, state: RequestState, pass_info: PassInfo, name: str, **more: object
    ) -> None:
        if not (self.log or self.file):
            return
        line: dict[str, Any] = {
            "decision": decision,
            "pass": pass_info.pass_no,
            "rid": getattr(state.handle, "rid", state.seq),
            "class": name,
            "phase": state.phase.value,
            "phase_tokens": state.phase_tokens,
            "kv_tokens": state.kv_tokens,
            **more,
        }
        if self.log:
            logger.info(json.dumps(line))
        if self.file is not None:
            self.file.append(line)
