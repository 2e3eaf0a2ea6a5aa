"""Instances that are being emptied: their requests move away, and no new one comes.

| an instance | on | becomes |
|---|---|---|
| serving | `begin`, while another one serves | draining |
| draining, drained | `end`, or the last one that serves has died | serving |
| drained, told to end | `ends` | ending: `end` comes too late |
| draining | no request is left | drained |
| drained | a request comes after all: its migration to here was under way | draining |
| any | `died` | none |

A move that fails is tried again, later each time, towards another instance if there is one: what
keeps a request may pass, as the prefill does that it takes part in. One that its targets have no
memory for goes without its KV at last, and is prefilled again there. A request that cannot move
ends where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pascal_sglang.cluster.messages import MAX_REASON, MAX_REASONS, DrainProgress
from pascal_sglang.cluster.migration_coordinator import (
    UNREACHABLE,
    MigrationCoordinator,
    UnderWay,
)
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.policy.placement import Instance

# Moves to one instance at a time: half of the slots of its receive buffer.
AT_ONCE = 4
# Until a move that failed is tried again, in seconds; twice as long each time.
AGAIN_S = 0.25
AGAIN_AT_MOST_S = 5.0
# Why a request's KV cannot come: its target has no memory for it, or there is no way for KV to it.
# After so many such words the request goes without.
FULL = ("full", "no windows", "no states", "transport")
FULL_TRIES = 3
# Between two looks at what is left, in seconds.
LOOK_S = 0.02

SERVING, DRAINING, DRAINED = "serving", "draining", "drained"


@dataclass(slots=True)
class _Attempts:
    """Of one request. target: of the last move. full: moves that its target had no memory for. why:
    the last one failed. again_at: when it may be told to move again, in seconds."""

    target: int = -1
    tries: int = 0
    full: int = 0
    why: str = ""
    again_at: float = float("-inf")


@dataclass(slots=True)
class _Drain:
    since: float
    moved: int = 0
    left: int = 0
    # TP ranks of the instance whose processes were told to end, and wait for this. Only here is
    # that known: whoever lifts the drain takes it back.
    told: set[int] = field(default_factory=set)
    # They have been told that they may.
    ending: bool = False
    attempts: dict[str, _Attempts] = field(default_factory=dict)


class Drains:
    """Which instances are drained, and how far.

    choose: the index of the instance, among some, that a request of another one goes to, whose
    index comes second. why_none_moves: what
    keeps every request where it is; empty where they can move. outcomes: ends of the moves that
    were ordered here, `moved` or `kept:<why>`.
    """

    def __init__(
        self,
        request_locations: RequestLocations,
        coordinator: MigrationCoordinator,
        choose: Callable[[Sequence[Instance], int], int],
        why_none_moves: str = "",
    ) -> None:
        self.request_locations, self.coordinator, self.choose = (
            request_locations,
            coordinator,
            choose,
        )
        self.why_none_moves = why_none_moves
        self.outcomes: Counter[str] = Counter()
        self._drains: dict[int, _Drain] = {}
        self._looked_at = float("-inf")

    def __bool__(self) -> bool:
        return bool(self._drains)

    def holds(self, instance: int) -> bool:
        """Whether the instance takes no new request."""
        return instance in self._drains

    def begin(self, instance: int, alive: Sequence[int], now: float) -> str:
        """Drain an instance; nothing happens to one that is drained already. alive: those that
        live. Returns why it is not drained, or nothing."""
        if instance not in alive:
            return f"Instance {instance} has died."
        if self.holds(instance):
            return ""
        if all(i == instance or self.holds(i) for i in alive):
            return f"Instance {instance} is the last one that takes requests."
        self._drains[instance] = _Drain(now)
        self._looked_at = float("-inf")
        return ""

    def end(self, instance: int) -> str:
        """The instance takes requests again, and does not end if it was told to. Moves under way go
        on. Returns why not, or nothing."""
        drain = self._drains.get(instance)
        if drain is not None and drain.ending:
            return f"Instance {instance} was told to end, and ends."
        self._drains.pop(instance, None)
        return ""

    def died(self, instance: int, alive: Sequence[int]) -> list[int]:
        """An instance is no more. Returns those that serve again because no other is left."""
        self._drains.pop(instance, None)
        if not alive or any(not self.holds(i) for i in alive):
            return []
        lifted = list(self._drains)
        self._drains.clear()
        return lifted

    def told_to_end(self, instance: int, rank: int) -> bool:
        """A process of the instance, which is drained, was told to end; whether it was before."""
        told = self._drains[instance].told
        before = rank in told
        told.add(rank)
        return before

    def told(self, instance: int) -> set[int]:
        """TP ranks of the instance whose processes were told to end."""
        drain = self._drains.get(instance)
        return set() if drain is None else drain.told

    def ends(self, instance: int) -> None:
        """The instance has been told that it may end."""
        self._drains[instance].ending = True

    def settled(self, ended: UnderWay, *, done: bool, why: str, now: float) -> None:
        """A move has ended: `done`, or the request stays."""
        if ended.drained:
            self.outcomes["moved" if done else f"kept:{why}"] += 1
        drain = self._drains.get(ended.source)
        if drain is None:
            return
        self._looked_at = float("-inf")
        if done:
            drain.moved += 1
            drain.attempts.pop(ended.rid, None)
        elif (tried := drain.attempts.get(ended.rid)) is not None:
            tried.why = why
            tried.full += why in FULL
            wait = AGAIN_S * 2.0 ** min(tried.tries - 1, 10)
            tried.again_at = now + min(wait, AGAIN_AT_MOST_S)

    def step(self, serving: Sequence[Instance], now: float) -> list[int]:
        """Order the moves that are due. serving: the instances that take requests. Returns those
        that were told to end and now may."""
        if not self._drains or now - self._looked_at < LOOK_S:
            return []
        self._looked_at = now
        busy = Counter(going.target for going in self.coordinator.under_way.values())
        for instance, drain in self._drains.items():
            here = self.request_locations.of(instance)
            drain.left = len(here)
            if drain.attempts:
                present = set(here)
                drain.attempts = {r: a for r, a in drain.attempts.items() if r in present}
            if not self.why_none_moves:
                self._empty(instance, drain, here, serving, busy, now)
        told = [i for i, drain in self._drains.items() if drain.told and not drain.ending]
        return [i for i in told if self._is_empty(i)]

    def _is_empty(self, instance: int) -> bool:
        """Whether no request is on an instance, or on its way there."""
        under_way = self.coordinator.under_way.values()
        coming = any(going.target == instance for going in under_way)
        return not coming and not self.request_locations.of(instance)

    def _empty(
        self,
        instance: int,
        drain: _Drain,
        here: Sequence[str],
        serving: Sequence[Instance],
        busy: Counter[int],
        now: float,
    ) -> None:
        migrating = self.coordinator.migrating()
        for rid in here:
            free = [i for i in serving if busy[i.index] < AT_ONCE and i.index != instance]
            if not free:
                return
            tried = drain.attempts.get(rid)
            if rid in migrating or (tried is not None and now < tried.again_at):
                continue
            others = [i for i in free if tried is None or i.index != tried.target]
            target = self.choose(others or free, instance)
            if tried is None:
                tried = drain.attempts[rid] = _Attempts()
            tried.target, tried.tries = target, tried.tries + 1
            busy[target] += 1
            without_kv = tried.full >= FULL_TRIES
            over = self.coordinator.drain(rid, instance, target, now, without_kv=without_kv)
            if over is not None:
                self.settled(over, done=False, why=UNREACHABLE, now=now)

    def progress(self, instance: int, now: float) -> DrainProgress:
        """How far the instance is, for the status and whoever asked for it."""
        drain = self._drains.get(instance)
        here = set(self.request_locations.of(instance))
        moving = here & self.coordinator.migrating()
        left = len(here)
        if drain is None:
            return DrainProgress(SERVING, left, len(moving), 0, {}, 0.0)
        kept = self._kept(drain, here - moving)
        state = DRAINED if self._is_empty(instance) else DRAINING
        seconds = round(max(0.0, now - drain.since), 3)
        return DrainProgress(state, left, len(moving), drain.moved, kept, seconds)

    def _kept(self, drain: _Drain, here: set[str]) -> dict[str, int]:
        if self.why_none_moves:
            return {self.why_none_moves[:MAX_REASON]: len(here)} if here else {}
        attempts = drain.attempts.items()
        kept = Counter(a.why[:MAX_REASON] for rid, a in attempts if a.why and rid in here)
        return dict(kept.most_common(MAX_REASONS))

    def left(self) -> list[int]:
        """Requests left on each instance that is drained, at the last look."""
        return [drain.left for drain in self._drains.values()]

    def describe(self, now: float) -> dict[str, Any]:
        """For `GET /pascal/status`: the progress of each drain, by instance."""
        return {str(i): self.progress(i, now).describe() for i in sorted(self._drains)}
