"""The `pascal:` series of one instance's moves."""

from __future__ import annotations

from collections.abc import Mapping

_SECONDS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class MigrationMetrics:
    """Built inside the scheduler process, like `metrics.PhaseMetrics`."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Histogram

        self._labels = dict(labels)
        names = list(labels)
        self._ended = Counter(
            "pascal:migrations",
            "Migrations that ended. way: out (of here) or in. outcome: moved, taken, or why not.",
            [*names, "way", "outcome"],
        )
        self._bytes = Counter("pascal:migrated_bytes", "Bytes of KV sent, per rank.", names)
        self._blocked = Histogram(
            "pascal:migration_blocking_seconds",
            "From the last token on one instance to the first on the next.",
            names,
            buckets=_SECONDS,
        )
        self._unmovable = Counter(
            "pascal:unmovable_requests",
            "Requests that ended their thinking and cannot move, by reason.",
            [*names, "reason"],
        )
        self._rejected = Counter(
            "pascal:rejected_messages",
            "Malformed control messages, by reason.",
            [*names, "reason"],
        )

    def ended(self, way: str, outcome: str) -> None:
        self._ended.labels(**self._labels, way=way, outcome=outcome).inc()

    def sent(self, size: int) -> None:
        self._bytes.labels(**self._labels).inc(size)

    def blocked(self, seconds: float) -> None:
        self._blocked.labels(**self._labels).observe(seconds)

    def unmovable(self, reason: str) -> None:
        self._unmovable.labels(**self._labels, reason=reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(**self._labels, reason=reason).inc()
