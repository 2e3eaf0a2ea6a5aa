"""Requests that wait or are paused, best first, without sorting all of them in every pass."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Generator, Iterable, Iterator

from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning, credit_of
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState, RequestStatus

# Priority, key, order of arrival, ticket.
Entry = tuple[int, float, int, int, RequestState]


class WaitQueue:
    """Requests that do not run, in priority classes whose inner order does not change meanwhile.

    Within a class, requests are ordered by priority, then by the policy's key. A class whose
    requests turn urgent, which goes before priorities, is held apart by priority, and every class
    by tenant, since how far a tenant is ahead changes meanwhile. Adding and removing cost O(log n);
    walking the first k costs O(k log n) and a comparison per class. The entry of a removed request
    stays behind with an outdated ticket until it surfaces. Neither the status of a request nor its
    `remaining` may change while it is in the queue.
    """

    # Requests by (class, status), without internal ones.
    counts: Counter[tuple[int, RequestStatus]]
    # Paused requests whose KV is on the device, in the order in which they came.
    resident: dict[RequestState, None]
    # Requests that end their phase within a quantum, as far as limits say.
    ending: set[RequestState]
    # Requests by tenant, without tenants that have none here.
    tenants: Counter[str]
    # How often the queue has become empty.
    emptied: int
    # Grows whenever a request comes, goes, or changes what orders it.
    changes: int

    def __init__(self, policy: Policy, tuning: Tuning) -> None:
        self.policy = policy
        self.tuning = tuning
        self.counts = Counter()
        self.resident = {}
        self.ending = set()
        self.tenants = Counter()
        self.emptied = 0
        self.changes = 0
        # By class, by priority where that is held apart, and by tenant.
        self._classes: dict[tuple[int, int, str], list[Entry]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def started(self, request: RequestState, pass_info: PassInfo) -> None:
        """Note that a request runs from now on. It keeps the rank that its waiting earned."""
        self.remove(request)
        quanta = self.policy.rank(request, pass_info, self.tuning)[-1]
        request.enter(RequestStatus.RUNNING, pass_info.pass_no, pass_info.now)
        request.credit += self.policy.rank(request, pass_info, self.tuning)[-1] - quanta

    def stopped(self, request: RequestState, status: RequestStatus, pass_info: PassInfo) -> None:
        """Note that a request waits or is paused from now on."""
        self.remove(request)
        request.credit = credit_of(request, self.tuning)
        request.enter(status, pass_info.pass_no, pass_info.now)
        self.add(request)

    def spilled(self, request: RequestState, status: RequestStatus) -> None:
        """Note that the KV of a paused request has left the device. Its waiting goes on."""
        self.remove(request)
        request.status = status
        self.add(request)

    def remove(self, request: RequestState) -> None:
        """Note that a request does not wait any more; nothing happens if it is not here."""
        self.resident.pop(request, None)
        if self.holds(request):
            request.ticket += 1
            self.counts[request.priority_class, request.status] -= not request.internal
            self.ending.discard(request)
            self.tenants[request.tenant] -= 1
            if not self.tenants[request.tenant]:
                del self.tenants[request.tenant]
            self._size -= 1
            self.emptied += not self._size
            self.changes += 1

    def recount(self, requests: Iterable[RequestState]) -> None:
        """Make the queue anew from the requests that truly wait."""
        for entries in self._classes.values():
            for *_, request in entries:
                self.remove(request)
        self._classes.clear()
        self.counts.clear()  # A status may have changed in the queue.
        for request in requests:
            self.add(request)

    def retune(self, policy: Policy, tuning: Tuning) -> None:
        """Order the same requests by another policy, or other numbers of it."""
        entries = [entry for each in self._classes.values() for entry in each]
        present = [request for *_, ticket, request in entries if ticket == request.ticket]
        self.policy, self.tuning = policy, tuning
        self.recount(present)

    def add(self, request: RequestState) -> None:
        """Put a request in the queue, or again after a change of what orders it."""
        self.remove(request)
        request.ticket += 1
        key = self.policy.key(request, self.tuning)
        number = request.priority_class = self.policy.priority_class(request, self.tuning)
        apart = request.priority if number == self.policy.turns_urgent else 0
        entries = self._classes.setdefault((number, apart, request.tenant), [])
        heapq.heappush(entries, (request.priority, key, request.seq, request.ticket, request))
        self.counts[request.priority_class, request.status] += not request.internal
        self.tenants[request.tenant] += 1
        self._size += 1
        self.changes += 1
        if request.status is RequestStatus.RESIDENT:
            self.resident[request] = None
        if request.remaining < self.tuning.quantum:
            self.ending.add(request)

    def holds(self, request: RequestState) -> bool:
        return request.ticket % 2 == 1

    def lengths(self) -> dict[tuple[str, str], int]:
        """Requests by (name of the class, status). A paused answer counts as `answer` whether or
        not its reader is about to run dry."""
        return {
            (self.policy.class_names[number], status.value): count
            for (number, status), count in self.counts.items()
        }

    def requests(self) -> Iterator[RequestState]:
        """Those in the queue, in no order."""
        for entries in self._classes.values():
            yield from (e[-1] for e in entries if e[3] == e[-1].ticket)

    def ranked(self, requests: Iterable[RequestState], pass_info: PassInfo) -> list[RequestState]:
        """Any requests, in the queue or not, best first."""

        def order(request: RequestState) -> tuple[Rank, float, int]:
            rank = self.policy.rank(request, pass_info, self.tuning)
            return rank, self.policy.key(request, self.tuning), request.seq

        return sorted(requests, key=order)

    def resident_worst_first(self, pass_info: PassInfo) -> list[RequestState]:
        """Paused requests whose KV is on the device; the one that resumes last comes first."""
        return self.ranked(self.resident, pass_info)[::-1]

    def best_first(self, pass_info: PassInfo) -> Generator[RequestState]:
        """The requests in the queue by `(rank, key, seq)`; the queue stays as it is."""
        taken: list[tuple[list[Entry], Entry]] = []
        # Priorities come and go with requests, and so do their classes.
        self._classes = {c: entries for c, entries in self._classes.items() if _surface(entries)}
        rank, tuning = self.policy.rank, self.tuning
        # The first of each class; ranks are compared as they are in this pass.
        heads: list[tuple[Rank, float, int, list[Entry]]] = []
        for entries in self._classes.values():
            _, key, seq, _, request = entries[0]
            heads.append((rank(request, pass_info, tuning), key, seq, entries))
        heapq.heapify(heads)  # Never compares entries: `seq` is unique.
        try:
            while heads:
                best = heads[0][-1]
                taken.append((best, entry := heapq.heappop(best)))
                if _surface(best):
                    _, key, seq, _, request = best[0]
                    heapq.heapreplace(heads, (rank(request, pass_info, tuning), key, seq, best))
                else:
                    heapq.heappop(heads)
                yield entry[-1]
        finally:
            for entries, entry in taken:
                heapq.heappush(entries, entry)


def _surface(entries: list[Entry]) -> bool:
    """Drop outdated entries from the top; whether a true one is left."""
    while entries:
        if entries[0][3] == entries[0][4].ticket:
            return True
        heapq.heappop(entries)
    return False
