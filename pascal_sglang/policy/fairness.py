"""Fairness between tenants: how far one may get ahead of another, around the order of any policy.

Source: the virtual token counter of "Fairness in Serving Large Language Models" (OSDI 2024). A
counter here charges what is scarce here, KV held times the time that it is held, and goes by
`STEPS` of a bound, so that requests do not displace each other with every token.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Protocol

from pascal_sglang.policy.queue import WaitQueue
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState

# Seconds between two looks at who holds how much, on average. They vary by half of that to either
# side: requests that last just as long would always be seen at the same point.
LOOK_S = 0.25
GOLDEN = (5**0.5 - 1) / 2
# The most that one look charges, in seconds: an engine that stood still served nobody.
MOST_S = 1.0
# Steps of the bound. A tenant that is ahead by one goes behind all that are not.
STEPS = 2
# Tenants without requests here that are remembered.
MOST_IDLE = 1024
# Tenants that a forecast tells apart: those with the most requests. All others are one group.
APART = 2
OTHERS = "others"


class Leads(Protocol):
    """Says how far tenants are ahead."""

    def ahead_of(self, tenant: str) -> int:
        """Steps of the bound by which a tenant is ahead of the least of those who are here."""


class TenantCounters:
    """What each tenant has been served while requests had to wait, in seconds of the whole pool.

    The bound: of two tenants that both have requests waiting, neither is served once it is more
    than `bound_s` ahead, as long as waiting requests of the other fit into what its own give back.
    A tenant that is new, or whose counter was forgotten, begins where the least of those who wait
    stands. One that asks for less than its share falls behind by `bound_s` at most.
    """

    # How many steps of the bound each tenant is ahead; those that are not ahead are left out.
    ahead: dict[str, int]

    def __init__(self, capacity: int, bound_s: float, held: Callable[[RequestState], int]) -> None:
        """capacity: KV entries of the pool. held: those that a running request has."""
        self.capacity = capacity
        self.bound_s = bound_s
        self.ahead = {}
        self._held = held
        # In the order in which they last had requests here.
        self._served: dict[str, float] = {}
        # Where a new tenant begins: the most that the least of those who wait had been served. It
        # never falls, and gains as an equal share would give, or new tenants without end would keep
        # everybody else waiting.
        self._begins_at = 0.0
        self._looked_at: float | None = None
        self._looks = 0
        self._emptied = 0

    def ahead_of(self, tenant: str) -> int:
        return self.ahead.get(tenant, 0)

    def looks_at(self, now: float) -> float:
        """When the next look is due, in seconds."""
        if self._looked_at is None:
            return now
        return self._looked_at + LOOK_S * (0.5 + self._looks * GOLDEN % 1)

    def look(self, running: Iterable[RequestState], queue: WaitQueue, now: float) -> None:
        """Charge what `running` requests hold, where some wait in the `queue`, and see who is
        ahead. In every pass; `now` is its time in seconds."""
        if not queue:
            return
        begins = self._looked_at is None or queue.emptied != self._emptied
        since = now if begins or self._looked_at is None else self._looked_at
        if not begins and now < self.looks_at(now):
            return
        self._looked_at, self._emptied = now, queue.emptied
        self._looks += 1
        seconds = min(now - since, MOST_S)
        present = dict.fromkeys(queue.tenants)
        for tenant in present:
            self._served.setdefault(tenant, self._begins_at)
        charged = 0.0
        for request in running:
            tenant = request.tenant
            present[tenant] = None
            charge = seconds * self._held(request) / self.capacity
            charged += charge
            self._served[tenant] = self._served.setdefault(tenant, self._begins_at) + charge
        # Not of the whole pool: what is short may be slots, of which a full number fills little.
        self._begins_at += charged / len(present)
        waiting = min(self._served[tenant] for tenant in queue.tenants)
        self._begins_at = max(self._begins_at, waiting)
        self._bring_up(present)
        self._see_who_is_ahead(present)
        self._forget(len(present))

    def _bring_up(self, present: Iterable[str]) -> None:
        """Nobody is behind by more than the bound, and those who are here were here last."""
        for tenant in present:
            served = self._served.pop(tenant)
            self._served[tenant] = max(served, self._begins_at - self.bound_s)

    def _see_who_is_ahead(self, present: Iterable[str]) -> None:
        served = {tenant: self._served[tenant] for tenant in present}
        self.ahead = steps_ahead(served, self.ahead, self.bound_s)

    def served_of(self, tenant: str) -> float:
        """Seconds of the whole pool; of a tenant that is not known, where it begins."""
        return self._served.get(tenant, self._begins_at)

    def _forget(self, present: int) -> None:
        while len(self._served) > present + MOST_IDLE:
            del self._served[next(iter(self._served))]

    def describe(self, most: int = 16) -> dict[str, Any]:
        """For `GET /pascal/status`: tenants, and how far those here last are ahead of where a new
        one begins, in seconds of the whole pool."""
        last = list(self._served.items())[: -most - 1 : -1]
        leads = {tenant: round(served - self._begins_at, 3) for tenant, served in last}
        return {"bound_s": self.bound_s, "tenants": len(self._served), "ahead_s": leads}


def steps_ahead(
    served: Mapping[str, float], before: Mapping[str, int], bound_s: float
) -> dict[str, int]:
    """Steps of the bound by which each is ahead of the least, without those that are not. A tenant
    falls back by half a step only, so that it does not come and go."""
    step = bound_s / STEPS
    least = min(served.values())
    ahead: dict[str, int] = {}
    for tenant, its in served.items():
        steps = (its - least) / step
        if found := max(int(steps), min(before.get(tenant, 0), int(steps + 0.5))):
            ahead[tenant] = found
    return ahead


class TenantGroups:
    """Tenants in a forecast: `APART` of them one by one, and all others as if they were one whose
    requests are shared out alike. A group is called as its tenant, or `OTHERS`."""

    def __init__(self, counters: TenantCounters, requests: Counter[str]) -> None:
        """requests: how many each tenant has here."""
        self.bound_s = counters.bound_s
        self.apart = [tenant for tenant, _ in requests.most_common(APART)]
        others = requests.keys() - set(self.apart)
        # Tenants of each group, its part of the requests, and what each of its tenants was served.
        self.sizes = dict.fromkeys(self.apart, 1) | {OTHERS: max(1, len(others))}
        self.shares = {tenant: requests[tenant] / requests.total() for tenant in self.apart}
        self.shares[OTHERS] = 1.0 - sum(self.shares.values())
        self._served = {tenant: counters.served_of(tenant) for tenant in self.apart}
        each = [counters.served_of(tenant) for tenant in others] or [counters.served_of(OTHERS)]
        self._served[OTHERS] = sum(each) / len(each)
        self.ahead = {tenant: counters.ahead_of(tenant) for tenant in self.apart}
        self.ahead[OTHERS] = min((counters.ahead_of(tenant) for tenant in others), default=0)

    def group_of(self, tenant: str) -> str:
        return tenant if tenant in self._served else OTHERS

    def ahead_of(self, tenant: str) -> int:
        return self.ahead.get(self.group_of(tenant), 0)

    def charge(self, group: str, seconds: float) -> None:
        """The requests of a group have held so much of the whole pool for so many seconds."""
        self._served[group] += seconds / self.sizes[group]

    def look(self, present: Container[str]) -> None:
        """See who is ahead among the groups that have requests."""
        served = {group: its for group, its in self._served.items() if group in present}
        if served:
            self.ahead = steps_ahead(served, self.ahead, self.bound_s)


def with_fairness(policy: Policy, tenants: Leads) -> Policy:
    """The policy with those tenants behind that are ahead of others: `(steps ahead, *rank)`.

    It goes before priorities and before urgent answers: a bound that either breaks is none.
    """
    ahead = tenants.ahead_of

    def rank(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
        return (ahead(request.tenant), *policy.rank(request, pass_info, tuning))

    def displaces(starting: Rank, running: Rank) -> bool:
        if starting[0] != running[0]:
            return starting[0] < running[0]
        return policy.displaces(starting[1:], running[1:])

    return dataclasses.replace(policy, rank=rank, worst=None, displaces=displaces)
