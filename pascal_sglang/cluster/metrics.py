"""The `pascal:` series of the controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pascal_sglang.cluster.metric_files import survive_a_full_disk

# What an instance can be. Silent: it has not said for a while how it is.
STATES = ("live", "silent", "dead")


class FrontendMetrics:
    """Counters of the process that serves HTTP."""

    def __init__(self, model: str) -> None:
        from prometheus_client import Counter

        survive_a_full_disk()
        self._model = model
        self._series = {
            "refused": Counter(
                "pascal:refused_requests",
                "Requests answered with 503, because their answer would have begun too late: "
                "max_ttfo (--pascal-max-ttfo) or deadline (their own ttfo_deadline_s); or because "
                "the server is drained.",
                ["model_name", "why"],
            ),
            "capped": Counter(
                "pascal:capped_requests",
                "Requests that got a thinking budget here: brownout (--pascal-brownout) or effort "
                "(--pascal-effort-budgets).",
                ["model_name", "why"],
            ),
        }

    def count(self, name: str, why: str) -> None:
        """One more request is `refused` or `capped`."""
        self._series[name].labels(self._model, why).inc()


class ControllerMetrics:
    """Counters that follow the controller's own; built in its process after SGLang set
    `PROMETHEUS_MULTIPROC_DIR`, which `prometheus_client` reads on import."""

    def __init__(self, model: str) -> None:
        from prometheus_client import Counter, Gauge

        survive_a_full_disk()
        self._model = model
        self._series = {
            name: Counter(f"pascal:{name}", text, ["model_name", label])
            for name, label, text in (
                ("placed_requests", "dp_rank", "New requests sent to an instance."),
                ("boundary_decisions", "why", "Decisions at the end of thinking, by reason."),
                ("controller_rejected", "reason", "Malformed control messages to the controller."),
                (
                    "controller_errors",
                    "doing",
                    "Errors that the controller survived, by what it was doing.",
                ),
                (
                    "drain_moves",
                    "outcome",
                    "Moves off instances that are drained: moved, or kept:REASON.",
                ),
            )
        }
        self._instances = Gauge(
            "pascal:instances",
            "Instances by state: live, silent or dead.",
            ["model_name", "state"],
            multiprocess_mode="mostrecent",
        )
        self._drained = Gauge(
            "pascal:drained_instances",
            "Instances that take no new requests, because they are drained.",
            ["model_name"],
            multiprocess_mode="mostrecent",
        )
        self._undrained = Gauge(
            "pascal:undrained_requests",
            "Requests left on instances that are drained.",
            ["model_name"],
            multiprocess_mode="mostrecent",
        )
        self._reported: dict[tuple[str, str], int] = {}

    def follow(self, name: str, counts: Mapping[str, int]) -> None:
        """Report what has been added to `counts`."""
        for label, count in counts.items():
            new = count - self._reported.get((name, label), 0)
            if new:
                self._series[name].labels(self._model, label).inc(new)
                self._reported[name, label] = count

    def count_instances(self, counts: Mapping[str, int]) -> None:
        """Report how many instances are in each state."""
        for state in STATES:
            self._instances.labels(self._model, state).set(counts.get(state, 0))

    def count_undrained(self, left: Sequence[int]) -> None:
        """Report how many requests are left on each instance that is drained."""
        self._drained.labels(self._model).set(len(left))
        self._undrained.labels(self._model).set(sum(left))
