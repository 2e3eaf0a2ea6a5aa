"""The `pascal:` Prometheus series, exported beside SGLang's own on `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pascal_sglang.policy.kv_tier import KVTier
from pascal_sglang.policy.plan import SHORTAGES
from pascal_sglang.policy.timeline import PhaseTimeline
from pascal_sglang.support import Support

_LATENCY = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)
_QOE = (0.1, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 1.0)
_TPOT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


class PhaseMetrics:
    """Histograms of what the user feels and counters of how requests ended.

    Built inside the scheduler process after SGLang set `PROMETHEUS_MULTIPROC_DIR`;
    `prometheus_client` reads it on import.
    """

    def __init__(self, labels: Mapping[str, str], qoe_slo: float) -> None:
        from prometheus_client import Counter, Histogram

        self.qoe_slo = qoe_slo

        names = list(labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pascal:{name}", text, names, buckets=buckets).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"pascal:{name}", text, names).labels(**labels)

        self._ttft = histogram("ttft_seconds", "Arrival to first token of any kind.", _LATENCY)
        self._reasoning = histogram(
            "reasoning_seconds", "First token to end-of-thinking token.", _LATENCY
        )
        self._ttfo = histogram("ttfo_seconds", "Arrival to first answering token.", _LATENCY)
        self._tpot = histogram(
            "answer_tpot_seconds", "Mean time per answering token after the first.", _TPOT
        )
        self._qoe = histogram("answer_qoe", "QoE of answers at the reader's pace.", _QOE)
        self._reasoning_tokens = counter("reasoning_tokens", "Thinking tokens generated.")
        self._answer_tokens = counter("answer_tokens", "Answering tokens generated.")
        self._violations = counter(
            "slo_violations", "Answers whose QoE ended below --pascal-qoe-slo."
        )
        requests = Counter(
            "pascal:requests",
            "Requests ended: answered, no_answer (ended inside its thinking), aborted.",
            [*names, "outcome"],
        )
        self._requests = {
            outcome: requests.labels(**labels, outcome=outcome)
            for outcome in ("answered", "no_answer", "aborted")
        }

    def record(self, timeline: PhaseTimeline, outcome: str, qoe: float | None) -> None:
        """Report a request that ended; what never happened is left out."""
        self._requests[outcome].inc()
        self._reasoning_tokens.inc(timeline.reasoning_tokens)
        self._answer_tokens.inc(timeline.answer_tokens)
        if qoe is not None and qoe < self.qoe_slo:
            self._violations.inc()
        for series, value in (
            (self._ttft, timeline.ttft),
            (self._reasoning, timeline.reasoning_time),
            (self._ttfo, timeline.ttfo),
            (self._tpot, timeline.answer_tpot),
            (self._qoe, qoe),
        ):
            if value is not None:
                series.observe(value)


class SupportMetrics:
    """The level that this instance runs at."""

    def __init__(self, labels: Mapping[str, str], support: Support) -> None:
        from prometheus_client import Gauge

        Gauge(
            "pascal:support_level",
            "What features of this instance leave: 0 observe, 1 order, 2 recompute, 3 pause, "
            "4 move (compatibility.md). reason: the features that keep it from the next level.",
            [*labels, "reason"],
            multiprocess_mode="mostrecent",
        ).labels(**labels, reason=support.reason).set(support.level)


class ForecastMetrics:
    """The forecast of a request that arrives now, and what came of earlier ones."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        self._labels = dict(labels)
        self._ttfo = Gauge(
            "pascal:ttfo_forecast_seconds",
            "Seconds until the first answering token of a request that arrives now, of which a "
            "share (quantile) has begun to answer by then.",
            [*labels, "quantile"],
            multiprocess_mode="mostrecent",
        )
        self._backlog = Gauge(
            "pascal:backlog_seconds",
            "Seconds of that time in which such a request waits for memory or slots: 0 where "
            "another instance would not help.",
            list(labels),
            multiprocess_mode="mostrecent",
        )
        self._forecasts = Counter(
            "pascal:forecasts",
            "Forecasts whose answer has begun. made: at arrival, while waiting, or so long after "
            "the first token. outcome: early, inside or late; the range is to hold 80 %.",
            [*labels, "made", "outcome"],
        )

    def show(self, ttfo: Mapping[str, float], backlog_s: float) -> None:
        """ttfo: seconds by quantile."""
        for quantile, seconds in ttfo.items():
            self._ttfo.labels(**self._labels, quantile=quantile).set(seconds)
        self._backlog.labels(**self._labels).set(backlog_s)

    def came_out(self, made: str, outcome: str) -> None:
        self._forecasts.labels(**self._labels, made=made, outcome=outcome).inc()


class ToolMetrics:
    """KV of conversations that wait for a tool, and what came of it."""

    def __init__(self, labels: Mapping[str, str], outcomes: Sequence[str], capacity: int) -> None:
        """capacity: bytes of such KV that host memory holds."""
        from prometheus_client import Counter, Gauge

        names = list(labels)

        def gauge(name: str, text: str) -> Gauge:
            whole = f"pascal:{name}"
            return Gauge(whole, text, names, multiprocess_mode="mostrecent").labels(**labels)

        self._waiting = gauge(
            "tool_conversations", "Conversations whose last reply called tools, remembered here."
        )
        self._bytes = gauge(
            "tool_kv_bytes",
            "KV of conversations that wait for a tool in host memory, in bytes, per rank.",
        )
        gauge("tool_kv_capacity_bytes", "Bytes of such KV that host memory holds.").set(capacity)
        self._keep = gauge(
            "tool_keep_seconds", "For how long such KV is kept, as learnt from earlier waits."
        )
        outcome = Counter(
            "pascal:tool_turns",
            "Conversations that waited for a tool, by what came of their KV. copied: the next turn "
            "got it back from host memory; resident: the device had it still; lost: neither had "
            "it, or a copy takes longer than a prefill; elsewhere: the next turn went to another "
            "instance; expired: none came in time; forgotten: there were too many.",
            [*names, "outcome"],
        )
        tokens = Counter(
            "pascal:tool_kv_tokens",
            "Tokens of such KV that were saved to host memory (saved) and brought back (copied).",
            [*names, "way"],
        )
        self._counters = {each: outcome.labels(**labels, outcome=each) for each in outcomes}
        for way in ("saved", "copied"):
            self._counters[f"{way}_tokens"] = tokens.labels(**labels, way=way)
        self._reported: dict[str, int] = {}

    def update(
        self, waiting: int, host_bytes: int, keep_s: float, counts: Mapping[str, int]
    ) -> None:
        """counts: of outcomes and tokens so far."""
        self._waiting.set(waiting)
        self._bytes.set(host_bytes)
        self._keep.set(keep_s)
        for name, counter in self._counters.items():
            count = counts.get(name, 0)
            if count != self._reported.get(name, 0):
                counter.inc(count - self._reported.get(name, 0))
                self._reported[name] = count


class DecisionMetrics:
    """What the policy decided and why: pauses, resumes, waits, queues, what the passes cost."""

    def __init__(
        self, labels: Mapping[str, str], kv_bytes_per_token: float, host_kv_capacity: int
    ) -> None:
        """host_kv_capacity: tokens of paused KV that host memory holds."""
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = dict(labels)
        self._bytes = kv_bytes_per_token
        names = list(labels)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"pascal:{name}", text, [*names, *more])

        self._paused = counter(
            "pauses",
            "Running requests that were paused. why: growth (the next steps would not fit), "
            "displaced (a request of better rank started), memory (this step did not fit).",
            "class",
            "why",
        )
        self._tiers = counter(
            "paused_kv",
            "Times KV was taken to a tier: resident (stays on the device), host, recompute.",
            "tier",
        )
        self._tier_tokens = counter("paused_tokens", "KV entries taken to a tier.", "tier")
        self._tier_bytes = counter("paused_bytes", "Bytes of KV taken to a tier, per rank.", "tier")
        self._starts = counter(
            "starts", "Requests admitted (from waiting) or resumed, by class.", "class", "status"
        )
        self._waits = Histogram(
            "pascal:wait_seconds",
            "How long a request waited for its start. status: waiting (never ran, or has to be "
            "prefilled again), resident or host (was paused).",
            [*names, "class", "status"],
            buckets=_LATENCY,
        )
        self._blocked = counter(
            "blocked_passes",
            "Passes in which the best request in the queue could not start, by what it lacked: "
            "memory, slots, states, windows, adapters (places for LoRA adapters), or rank (no "
            "request of worse rank to displace).",
            "shortage",
        )
        self._unpausable = counter(
            "unpausable_requests",
            "Requests that arrived and are not paused, by the feature of theirs or of the server "
            "that keeps them from it.",
            "reason",
        )
        self._totals = {
            "errors": counter("policy_errors", "Passes in which SGLang's order stood in."),
            "passes": counter("policy_passes", "Scheduler passes."),
            "seconds": counter(
                "policy_seconds", "Time that observing requests, planning and pausing took."
            ),
        }
        self._queued = Gauge(
            "pascal:queued_requests",
            "Requests that do not run, by class and status (waiting, resident, host).",
            [*names, "class", "status"],
            multiprocess_mode="mostrecent",
        )
        self._host_kv = Gauge(
            "pascal:host_kv_tokens",
            "Paused KV in host memory, in tokens.",
            names,
            multiprocess_mode="mostrecent",
        ).labels(**labels)
        Gauge(
            "pascal:host_kv_capacity_tokens",
            "Tokens of paused KV that host memory holds; what does not fit is recomputed.",
            names,
            multiprocess_mode="mostrecent",
        ).labels(**labels).set(host_kv_capacity)
        self._host_kv.set(0)  # Shown from the start too.
        self._host_kv_shown = 0
        self._longest = Gauge(
            "pascal:longest_wait_seconds",
            "How long the request has waited that has waited longest, by class. An answer ahead of "
            "its reader does not wait.",
            [*names, "class"],
            multiprocess_mode="mostrecent",
        )
        self._longest_shown: dict[str, float] = {}
        self._reported: dict[str, float] = dict.fromkeys(self._totals, 0.0)
        # Shown from the start: none so far is an answer too.
        for series in self._totals.values():
            series.labels(**self._labels)
        for shortage in SHORTAGES:
            self._blocked.labels(**self._labels, shortage=shortage)
        self._shown: dict[tuple[str, str], int] = {}

    def paused(self, name: str, why: str) -> None:
        self._paused.labels(**self._labels, **{"class": name}, why=why).inc()

    def unpausable(self, reason: str) -> None:
        self._unpausable.labels(**self._labels, reason=reason).inc()

    def left_device(self, tier: KVTier, tokens: int) -> None:
        for series, amount in (
            (self._tiers, 1.0),
            (self._tier_tokens, tokens),
            (self._tier_bytes, tokens * self._bytes),
        ):
            series.labels(**self._labels, tier=tier.value).inc(amount)

    def started(self, name: str, status: str, waited_s: float) -> None:
        where = {**self._labels, "class": name, "status": status}
        self._starts.labels(**where).inc()
        self._waits.labels(**where).observe(waited_s)

    def blocked(self, shortage: str) -> None:
        self._blocked.labels(**self._labels, shortage=shortage).inc()

    def update(
        self,
        totals: Mapping[str, float],
        queued: Mapping[tuple[str, str], int],
        host_kv_tokens: int,
    ) -> None:
        """Report what has changed: running totals, requests queued by (class, status), and tokens
        of paused KV in host memory."""
        for name, total in totals.items():
            if total != self._reported[name]:
                self._totals[name].labels(**self._labels).inc(total - self._reported[name])
                self._reported[name] = total
        for key, count in queued.items():
            if self._shown.get(key) != count:
                where = {**self._labels, "class": key[0], "status": key[1]}
                self._queued.labels(**where).set(count)
                self._shown[key] = count
        if host_kv_tokens != self._host_kv_shown:
            self._host_kv.set(host_kv_tokens)
            self._host_kv_shown = host_kv_tokens

    def waiting(self, longest: Mapping[str, float]) -> None:
        """Report the longest wait of each class, in seconds; none where nobody of it waits."""
        for name in {*self._longest_shown, *longest}:
            wait_s = longest.get(name, 0.0)
            if self._longest_shown.get(name) != wait_s:
                self._longest.labels(**self._labels, **{"class": name}).set(wait_s)
                self._longest_shown[name] = wait_s
