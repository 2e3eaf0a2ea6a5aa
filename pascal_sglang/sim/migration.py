"""Requests on their way from one instance to another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pascal_sglang.policy.request import RequestStatus
from pascal_sglang.policy.site import SAME_HOST
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.pascal_instance import PascalInstance
from pascal_sglang.sim.request import SimRequest
from pascal_sglang.sim.topology import Topology

# Tokens a target keeps free beyond what it was asked for.
SPARE = 64


class Network:
    """Full-duplex links, one per instance, and with a topology one per host and rack; transfers
    over a link go one after the other. sent_tokens: by distance (`policy.site`)."""

    def __init__(self, cost: Cost, instances: int, topology: Topology | None = None) -> None:
        self.cost = cost
        self.topology = topology
        # When each link is free again, either way; those unknown are.
        self._out: defaultdict[str, float] = defaultdict(float)
        self._in: defaultdict[str, float] = defaultdict(float)
        self.sent_tokens = [0, 0, 0]

    def token_s(self, source: int, target: int) -> float:
        """Seconds that a token of KV takes from one instance to another."""
        if self.topology is None:
            return self.cost.migration_token_s
        return self.topology.token_s(source, target)

    def send(self, source: int, target: int, tokens: int, now: float) -> float:
        """When `tokens` of KV that are ready at `now` have arrived."""
        leave, come, distance = [f"{source}"], [f"{target}"], SAME_HOST
        if self.topology is not None:
            leave, come, distance = self.topology.links(source, target)
        begin = max(now, *(self._out[link] for link in leave), *(self._in[link] for link in come))
        end = begin + tokens * self.token_s(source, target)
        self._out.update(dict.fromkeys(leave, end))
        self._in.update(dict.fromkeys(come, end))
        self.sent_tokens[distance] += tokens
        return end + self.cost.migration_s


@dataclass(slots=True, eq=False)
class Migration:
    """One move. asked: when it was decided (s). claimed: tokens it had then. reserved: tokens the
    target keeps for it. copied: tokens on their way or there."""

    request: SimRequest
    source: PascalInstance
    target: PascalInstance
    live: bool
    asked: float
    claimed: int
    reserved: int = 0
    copied: int = 0


class Migrations:
    """Carries moves out: ask, reserve, copy, hand over, take over.

    ended: told of every move that is over, and whether it was done. refusable: a target without
    room refuses; otherwise the KV goes to its host memory. transfers: seconds from asking until
    the KV was there.
    """

    def __init__(
        self,
        clock: Clock,
        network: Network,
        ended: Callable[[Migration, bool], None],
        *,
        refusable: bool = True,
    ) -> None:
        self.clock = clock
        self.network = network
        self.ended = ended
        self.refusable = refusable
        self.transfers: list[float] = []
        self.refused = 0
        self.under_way = 0

    def begin(
        self, request: SimRequest, source: PascalInstance, target: PascalInstance, *, live: bool
    ) -> None:
        """The request moves; unless `live` it has left its batch already."""
        migration = request.migration = Migration(
            request, source, target, live, self.clock.now, request.held
        )
        self.under_way += 1
        self.clock.at(self.clock.now + self.network.cost.migration_s, self._asked, migration)

    def _asked(self, migration: Migration) -> None:
        target, request = migration.target, migration.request
        target.catch_up()
        if request.migration is not migration:
            return self._over(migration, done=False)
        migration.source.catch_up()
        if request in migration.source.batch:
            migration.source.batch.sync(request)
        migration.copied = request.held
        wanted = migration.copied + SPARE
        if migration.live:
            token_s = self.network.token_s(migration.source.index, target.index)
            copy_s = migration.copied * token_s
            wanted += int(2 * copy_s / self.network.cost.step_s)
        room = target.memory.free >= wanted + len(target.batch)
        if request.status is RequestStatus.WAITING or (self.refusable and not room):
            self.refused += 1
            return self._over(migration, done=False)
        if room:
            target.memory.take(wanted)
            target.poke()  # It runs out of memory sooner now.
            migration.reserved = wanted
        begin = self.clock.now + self.network.cost.migration_s
        end = self.network.send(migration.source.index, target.index, migration.copied, begin)
        self.clock.at(end, self._copied, migration)

    def _copied(self, migration: Migration) -> None:
        self.transfers.append(self.clock.now - migration.asked)
        if not migration.live:
            migration.source.memory.give(migration.copied)
            migration.source.forget(migration.request)
            migration.source.poke()
            self._land(migration)
            return
        migration.source.hand_over(
            migration.request, migration, partial(self._handed_over, migration)
        )

    def _handed_over(self, migration: Migration, left: bool) -> None:
        """The source has let go of the request, and what it decoded since follows; or it stays."""
        if not left:
            return self._over(migration, done=False)
        delta = migration.request.held - migration.copied
        now = self.clock.now
        end = self.network.send(migration.source.index, migration.target.index, delta, now)
        self.clock.at(end, self._land, migration)

    def _land(self, migration: Migration) -> None:
        request, target = migration.request, migration.target
        target.catch_up()
        target.memory.give(migration.reserved)
        migration.reserved = 0
        request.moved += 1
        target.takes_over(request)
        self._over(migration, done=True)

    def _over(self, migration: Migration, *, done: bool) -> None:
        request = migration.request
        if migration.reserved:
            migration.target.catch_up()
            migration.target.memory.give(migration.reserved)
            migration.reserved = 0
            migration.target.poke()
        if not done and not migration.live and request.phase is not Phase.FINISHED:
            migration.source.takes_back(request)
        if request.migration is migration:
            request.migration = None
        self.under_way -= 1
        self.ended(migration, done)
