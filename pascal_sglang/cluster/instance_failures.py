"""An instance has died: its requests end with an error, all others go on.

SGLang takes the whole server down when a scheduler reports an exception, and notices nothing when
one is killed. Here the controller sees either by the process itself.
"""

from __future__ import annotations

from collections.abc import Callable

from pascal_sglang.cluster.migration_coordinator import MigrationCoordinator
from pascal_sglang.cluster.request_locations import RequestLocations

MESSAGE = "The instance that served this request has died."
# For the other side of a move under way to say whose the request is, in seconds.
CLAIM_S = 5.0


class InstanceFailures:
    """Ends what a dead instance leaves behind. fail: ends a request with an error, by name.

    dead: instances that have died.
    """

    def __init__(
        self,
        request_locations: RequestLocations,
        coordinator: MigrationCoordinator,
        fail: Callable[[str], None],
    ) -> None:
        self.request_locations, self.coordinator, self._fail = request_locations, coordinator, fail
        self.dead: set[int] = set()
        self._claimed: dict[str, float] = {}

    def died(self, instance: int, now: float) -> None:
        """All its requests end, but for those that were being moved away: their target knows
        whether they had arrived, and reports it."""
        self.dead.add(instance)
        leaving = {m.rid for m in self.coordinator.under_way.values() if m.source == instance}
        for rid in self.request_locations.of(instance):
            if rid in leaving:
                self._claimed[rid] = now + CLAIM_S
            else:
                self.fail(rid)

    def settled(self, rid: str) -> None:
        """A move of the request has ended, and its home is known for good."""
        self._claimed.pop(rid, None)
        if self.request_locations.instance_of(rid) in self.dead:
            self.fail(rid)

    def tick(self, now: float) -> None:
        """Requests that nobody claimed in time end too."""
        for rid in [r for r, until in self._claimed.items() if now > until]:
            del self._claimed[rid]
            self.fail(rid)

    def fail(self, rid: str) -> None:
        self._fail(rid)
        self.request_locations.gone(rid)
