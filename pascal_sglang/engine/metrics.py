"""The `pascal:` Prometheus series, exported beside SGLang's own on `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping

from pascal_sglang.policy.timeline import PhaseTimeline

_LATENCY = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)
_QOE = (0.1, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 1.0)
_TPOT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


class PhaseMetrics:
    """Histograms of what the user feels and counters of how requests ended.

    Built inside the scheduler process after SGLang set `PROMETHEUS_MULTIPROC_DIR`;
    `prometheus_client` reads it on import.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Histogram

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
        self._qoe = histogram(
            "answer_qoe", "QoE of answers at the reader's pace; below 0.95 misses the SLO.", _QOE
        )
        self._reasoning_tokens = counter("reasoning_tokens", "Thinking tokens generated.")
        self._answer_tokens = counter("answer_tokens", "Answering tokens generated.")
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
        for series, value in (
            (self._ttft, timeline.ttft),
            (self._reasoning, timeline.reasoning_time),
            (self._ttfo, timeline.ttfo),
            (self._tpot, timeline.answer_tpot),
            (self._qoe, qoe),
        ):
            if value is not None:
                series.observe(value)


class PauseMetrics:
    """What the pause ladder did: pauses by rung, resumes, KV entries moved, policy errors."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        names = list(labels)
        pauses = Counter(
            "pascal:pauses",
            "Pauses by rung: host (KV kept in host memory), recompute (KV dropped).",
            [*names, "rung"],
        )
        tokens = Counter(
            "pascal:paused_tokens", "KV entries taken off the device by pauses.", [*names, "rung"]
        )
        self._counters = {
            "host": pauses.labels(**labels, rung="host"),
            "recompute": pauses.labels(**labels, rung="recompute"),
            "host_tokens": tokens.labels(**labels, rung="host"),
            "recompute_tokens": tokens.labels(**labels, rung="recompute"),
            "resumed": Counter(
                "pascal:resumes", "Paused requests brought back without recompute.", names
            ).labels(**labels),
            "errors": Counter(
                "pascal:policy_errors", "Passes in which SGLang's order stood in.", names
            ).labels(**labels),
        }
        self._paused = Gauge(
            "pascal:paused_requests",
            "Requests paused with their KV in host memory.",
            names,
            multiprocess_mode="mostrecent",
        ).labels(**labels)
        self._reported: dict[str, int] = dict.fromkeys(self._counters, 0)
        self._last_paused = -1

    def update(self, counts: Mapping[str, int], paused: int, errors: int) -> None:
        """Report what has changed since the last pass."""
        if paused != self._last_paused:
            self._paused.set(paused)
            self._last_paused = paused
        for name, counter in self._counters.items():
            now = errors if name == "errors" else counts.get(name, 0)
            if now != self._reported[name]:
                counter.inc(now - self._reported[name])
                self._reported[name] = now
