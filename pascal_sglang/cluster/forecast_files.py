"""How instances show their forecasts to the process that serves HTTP: a file each, in a folder of
the server's own, whose path they find in their environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pascal_sglang import clock
from pascal_sglang.cluster import status_file
from pascal_sglang.policy.outlook import ArrivalOutlook

FOLDER_ENV = "PASCAL_SGLANG_FORECASTS"
# Seconds between two looks at a file.
LOOK_S = 0.25
# Seconds after which the forecast of an instance that has requests is too old.
OLD_S = 60.0


def file_name(instance: int) -> str:
    return f"forecast-{instance}.json"


@dataclass(frozen=True, slots=True)
class Shown:
    """What one instance shows.

    arrival: how a request fares that arrives now; by_tenant: one of tenants that fare otherwise.
    thinking: the percentiles `P75` and `P90` of
    thinking tokens here. requests: seconds until the answer, the median and the P90, of requests
    that asked for it, when the file was `age_s` old. idle: it had no request.
    """

    arrival: ArrivalOutlook
    thinking: dict[str, float]
    requests: dict[str, list[float]]
    age_s: float
    # A request that arrives now may get here; otherwise the instance is drained.
    takes_requests: bool = True
    idle: bool = False
    by_tenant: dict[str, ArrivalOutlook] = field(default_factory=dict)

    def arrival_of(self, tenant: str) -> ArrivalOutlook:
        return self.by_tenant.get(tenant, self.arrival)

    def has_backlog(self, tenant: str) -> bool:
        """Whether waiting makes a noticeable part of the time to an answer, for this tenant."""
        return self.arrival_of(tenant).waits > BACKLOG_SHARE


# Of the median time to an answer, the share spent waiting from which an instance has a backlog.
BACKLOG_SHARE = 0.2


@dataclass(slots=True)
class ForecastFiles:
    """Reads what instances show, by instance. states: says of each whether it is `live`, or
    `drained`."""

    folder: Path
    states: Callable[[], Sequence[str]]
    _shown: dict[int, Shown] = field(default_factory=dict)
    _looked_at: float = float("-inf")

    def shown(self) -> dict[int, Shown]:
        """By instance; those that are dead, silent or have shown nothing for long are left out."""
        now = clock.now()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            states = self.states()
            self._shown = {}
            for instance, state in enumerate(states):
                if state not in ("live", "drained"):
                    continue
                found = _read(self.folder / file_name(instance), state == "live")
                if found is not None:
                    self._shown[instance] = found
        return self._shown


def _read(path: Path, takes_requests: bool) -> Shown | None:
    try:
        told: dict[str, Any] = status_file.read(str(path))
        age_s: float = told["shown_s_ago"]
        if age_s > OLD_S and not told["idle"]:
            return None
        return Shown(
            ArrivalOutlook(**told["arrival"]),
            told["thinking"],
            told["requests"],
            age_s,
            takes_requests,
            bool(told["idle"]),
            {tenant: ArrivalOutlook(**each) for tenant, each in told["by_tenant"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # None yet, or of a process that has died.
