"""Which requests move where, and which moves are under way: the controller's side of moves."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pascal_sglang.cluster.load_tracker import LoadTracker
from pascal_sglang.cluster.messages import (
    DrainCommand,
    MigrateCommand,
    MigrationEnded,
    ReasoningEnded,
)
from pascal_sglang.policy.placement import Answer, Decision, Instance, Placement

# A move whose end nobody reports, in seconds: its instances stop counting it.
FORGET_S = 60.0
# Why a move ended that its source could not be told of.
UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class UnderWay:
    rid: str
    source: int
    target: int
    kv_tokens: int
    since: float
    # It was ordered to empty its instance, and the placement does not count it.
    drained: bool = False


class MigrationCoordinator:
    """Decides at boundaries and remembers what it ordered.

    order: sends a `MigrateCommand` to an instance; False if that failed. force_migration: for
    tests: every request moves. decisions: by reason. ended: moves by outcome.
    """

    def __init__(
        self,
        monitor: LoadTracker,
        placement: Placement,
        order: Callable[[int, MigrateCommand], bool],
        *,
        force_migration: bool = False,
    ) -> None:
        self.load_tracker, self.placement, self.order, self.force_migration = (
            monitor,
            placement,
            order,
            force_migration,
        )
        self.decisions: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.under_way: OrderedDict[str, UnderWay] = OrderedDict()
        self._count = 0

    def boundary(
        self, at: ReasoningEnded, active: Sequence[Instance], now: float
    ) -> Decision | None:
        """A request ends its reasoning on one of the active instances: decide, and order it to
        move. None if its instance is not among them."""
        if all(i.index != at.dp_rank for i in active):
            return None
        answer = Answer(at.dp_rank, at.kv_tokens, at.remaining, at.likely, at.passes)
        if self.force_migration:
            decision = self._elsewhere(at, active)
        else:
            here = self.load_tracker.instances[at.dp_rank]
            candidates = self.placement.in_sight(active, (at.dp_rank,), here)
            decision = self.placement.at_boundary(candidates, answer)
        self.decisions[decision.why] += 1
        if decision.target != at.dp_rank:
            migration = self._name(at.dp_rank, decision.target)
            self._begin(
                MigrateCommand(migration, at.rid, decision.target),
                UnderWay(at.rid, at.dp_rank, decision.target, at.kv_tokens, now),
            )
        return decision

    def drain(
        self, rid: str, source: int, target: int, now: float, *, without_kv: bool
    ) -> UnderWay | None:
        """Order a request to leave an instance that is drained. Returns the move if its instance
        cannot be reached: it is over then."""
        return self._begin(
            DrainCommand(self._name(source, target), rid, target, without_kv),
            UnderWay(rid, source, target, 0, now, drained=True),
        )

    def _name(self, source: int, target: int) -> str:
        self._count += 1
        return f"{source}-{target}-{self._count}"

    def _begin(self, command: MigrateCommand, going: UnderWay) -> UnderWay | None:
        self.under_way[command.migration] = going
        if self.order(going.source, command):
            return None
        return self._end(command.migration, done=False, why=UNREACHABLE)

    def migrating(self) -> set[str]:
        """Ids of the requests whose migration is under way."""
        return {going.rid for going in self.under_way.values()}

    def over(self, report: MigrationEnded) -> UnderWay | None:
        """A move has ended; None if that was known already."""
        return self._end(report.migration, done=report.done, why=report.why)

    def forget_old(self, now: float) -> None:
        """Once in a while: moves that nobody reports any more."""
        while self.under_way:
            migration, going = next(iter(self.under_way.items()))
            if now - going.since < FORGET_S:
                return
            self._end(migration, done=False, why="forgotten")

    def _end(self, migration: str, *, done: bool, why: str) -> UnderWay | None:
        going = self.under_way.pop(migration, None)
        if going is None:
            return None
        self.ended["moved" if done else f"kept:{why}"] += 1
        if not (self.force_migration or going.drained):
            instances = self.load_tracker.instances
            self.placement.moved(
                instances[going.source], instances[going.target], going.kv_tokens, done=done
            )
        return going

    def _elsewhere(self, at: ReasoningEnded, active: Sequence[Instance]) -> Decision:
        others = [i.index for i in active if i.index != at.dp_rank]
        if not others:
            return Decision(at.dp_rank, "alone")
        return Decision(others[self._count % len(others)], "force_migration")
