"""Which request lives on which instance, as far as the controller sent it there or moved it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

CAPACITY = 1 << 20


class RequestLocations:
    """Bounded: beyond `CAPACITY` live requests the oldest are forgotten."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._instances: OrderedDict[str, int] = OrderedDict()
        # Where there are several tokenizer workers: the address of each request's own.
        self._worker_ipcs: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def lives(self, rid: str, index: int, worker_ipc: str | None = None) -> None:
        """The request is on that instance now. worker_ipc: SGLang's `http_worker_ipc`, if it has
        one; it stays what it was."""
        self._instances[rid] = index
        if worker_ipc is not None:
            self._worker_ipcs[rid] = worker_ipc
        while len(self._instances) > self.capacity:
            oldest, _ = self._instances.popitem(last=False)
            self._worker_ipcs.pop(oldest, None)

    def worker_ipc(self, rid: str) -> str | None:
        """The tokenizer worker that waits for the request's outputs."""
        return self._worker_ipcs.get(rid)

    def instance_of(self, rid: str) -> int | None:
        return self._instances.get(rid)

    def gone(self, rid: str) -> None:
        """The request has ended."""
        self._instances.pop(rid, None)
        self._worker_ipcs.pop(rid, None)

    def __iter__(self) -> Iterator[str]:
        """Every request, beginning with the one not asked about for the longest time."""
        return iter(self._instances)

    def asked_about(self, rid: str) -> None:
        """The request is the last one to be asked about again (`cluster.location_check`)."""
        self._instances.move_to_end(rid)

    def of(self, index: int) -> list[str]:
        """All requests on an instance."""
        return [rid for rid, instance in self._instances.items() if instance == index]
