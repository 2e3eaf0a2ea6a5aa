"""Requests on their way from one instance to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pascal_sglang.policy.request import RequestStatus
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.clock import Clock
from pascal_sglang.sim.cost import Cost
from pascal_sglang.sim.pascal_instance import PascalInstance
from pascal_sglang.sim.request import SimRequest

# Tokens a target keeps free beyond what it was asked for.
SPARE = 64


class Network:
    """One full-duplex link per instance; transfers over a link go one after the other."""

    def __init__(self, cost: Cost, instances: int) -> None:
        self.cost = cost
        self._out = [0.0] * instances
        self._in = [0.0] * instances
        self.sent_tokens = 0

    def send(self, source: int, target: int, tokens: int, now: float) -> float:
        """When `tokens` of KV that are ready at `now` have arrived."""
        begin = max(now, self._out[source], self._in[target])
        end = begin + tokens * self.cost.move_token_s
        self._out[source] = self._in[target] = end
        self.sent_tokens += tokens
        return end + self.cost.move_s


@dataclass(slots=True, eq=False)
class Move:
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

    ended: told of every move that is over, and whether it was done. transfers: seconds from asking
    until the KV was there. pauses: seconds in which neither side decoded, of live moves.
    """

    def __init__(self, clock: Clock, network: Network, ended: Callable[[Move, bool], None]) -> None:
        self.clock = clock
        self.network = network
        self.ended = ended
        self.transfers: list[float] = []
        self.refused = 0
        self.under_way = 0

    def begin(
        self, request: SimRequest, source: PascalInstance, target: PascalInstance, *, live: bool
    ) -> None:
        """The request moves; unless `live` it has left its batch already."""
        move = request.move = Move(request, source, target, live, self.clock.now, request.held)
        self.under_way += 1
        self.clock.at(self.clock.now + self.network.cost.move_s, self._asked, move)

    def _asked(self, move: Move) -> None:
        target, request = move.target, move.request
        target.catch_up()
        if request.move is not move:
            return self._over(move, done=False)
        move.source.catch_up()
        if request in move.source.batch:
            move.source.batch.sync(request)
        move.copied = request.held
        wanted = move.copied + SPARE
        if move.live:
            copy_s = move.copied * self.network.cost.move_token_s
            wanted += int(2 * copy_s / self.network.cost.step_s)
        if (
            target.memory.free < wanted + len(target.batch)
            or request.status is RequestStatus.WAITING
        ):
            self.refused += 1
            return self._over(move, done=False)
        target.memory.take(wanted)
        target.poke()  # It runs out of memory sooner now.
        move.reserved = wanted
        begin = self.clock.now + self.network.cost.move_s
        end = self.network.send(move.source.index, target.index, move.copied, begin)
        self.clock.at(end, self._copied, move)

    def _copied(self, move: Move) -> None:
        self.transfers.append(self.clock.now - move.asked)
        if not move.live:
            move.source.memory.give(move.copied)
            move.source.forget(move.request)
            move.source.poke()
            self._land(move)
            return
        move.source.hand_over(move, self)

    def handed_over(self, move: Move) -> None:
        """The source has let go of the request; what it decoded since follows."""
        delta = move.request.held - move.copied
        now = self.clock.now
        end = self.network.send(move.source.index, move.target.index, delta, now)
        self.clock.at(end, self._land, move)

    def _land(self, move: Move) -> None:
        request, target = move.request, move.target
        target.catch_up()
        target.memory.give(move.reserved)
        move.reserved = 0
        request.moved += 1
        target.takes_over(request)
        self._over(move, done=True)

    def cancel(self, move: Move) -> None:
        """The request stays, or has ended, at its source."""
        self._over(move, done=False)

    def _over(self, move: Move, *, done: bool) -> None:
        request = move.request
        if move.reserved:
            move.target.catch_up()
            move.target.memory.give(move.reserved)
            move.reserved = 0
            move.target.poke()
        if not done and not move.live and request.phase is not Phase.FINISHED:
            move.source.takes_back(request)
        if request.move is move:
            request.move = None
        self.under_way -= 1
        self.ended(move, done)
