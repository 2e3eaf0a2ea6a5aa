"""The scheduling policies: one record each, of this package or of anybody's module."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass

from pascal_sglang.policy import ranking
from pascal_sglang.policy.placement import PlacementRule
from pascal_sglang.policy.rank_forecast import RankForecast
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.request import RequestState

# Right for every policy.
ANY_PASS = RankForecast(any_pass=True)


class UnknownPolicy(ValueError):
    """No policy has that name; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All that the engine, the controller and the simulator know of a policy.

    Only a request of strictly lower rank displaces another one. `key` and `priority_class` of a
    request do not change while it waits or is paused; within a class, `key` orders requests as
    their ranks do.
    """

    # `(class, quanta)`; lower goes first.
    rank: Callable[[RequestState, PassInfo, Tuning], Rank]
    key: Callable[[RequestState, Tuning], float]
    priority_class: Callable[[RequestState, Tuning], int] = ranking.one_class
    # What the classes are called in metrics and logs, by their number.
    class_names: tuple[str, ...] = ("all",)
    # The class of requests that still think and are not demoted.
    reasoning_class: int = 0
    # A rank that none exceeds, if there is one.
    worst: Rank | None = None
    # The class in ranks of answers whose readers are about to run dry, which go before priorities,
    # and the class in the queue whose requests get there, in the order of `key`, if there are any.
    urgent: int | None = None
    turns_urgent: int | None = None
    # Whether a request of the first rank, which starts, displaces a running one of the second.
    displaces: Callable[[Rank, Rank], bool] = operator.lt
    # Whether requests behind a first in line that does not fit may start (`Planner.backfill`).
    backfills: bool = False
    # When ranks change.
    forecast: RankForecast = ANY_PASS
    # How instances are chosen; None: by SGLang's own balancing.
    placement: PlacementRule | None = None
    # False: the server keeps SGLang's own order and only measures.
    schedules: bool = True

    def __post_init__(self) -> None:
        if (self.urgent is None) != (self.turns_urgent is None):
            raise ValueError("a policy names both `urgent` and `turns_urgent`, or neither")


POLICIES = {
    "pascal": Policy(
        rank=ranking.pascal,
        key=ranking.pascal_key,
        priority_class=ranking.pascal_class,
        class_names=(
            "overdue",
            "urgent_answer",
            "settling_answer",
            "thinking",
            "demoted",
            "program_answer",
            "answer",
        ),
        reasoning_class=ranking.THINKING,
        worst=ranking.AHEAD_RANK,
        urgent=ranking.URGENT,
        turns_urgent=ranking.AHEAD,
        backfills=True,
        forecast=RankForecast(quanta="phase", demotes=True, paced=True),
        placement=PlacementRule(),
    ),
    "paper": Policy(
        rank=ranking.paper,
        key=ranking.by_quanta,
        priority_class=ranking.paper_class,
        class_names=("high", "low"),
        forecast=RankForecast(quanta="phase", demotes=True),
        placement=PlacementRule(migrates=True, lazy=False, predict=False, running_qoe=True),
    ),
    "rr": Policy(
        rank=ranking.round_robin,
        key=ranking.by_all_quanta,
        forecast=RankForecast(quanta="all"),
    ),
    "rr-restart": Policy(
        rank=ranking.round_robin_restart,
        key=ranking.by_quanta,
        forecast=RankForecast(quanta="phase"),
    ),
    # In the simulator, the paper's FCFS: the request that came last gives way.
    "fcfs": Policy(
        rank=ranking.nobody_first,
        key=ranking.by_arrival,
        worst=(0, 0),
        forecast=RankForecast(),
        schedules=False,
    ),
}


def find(name: str) -> Policy:
    """The policy of a name: one of `POLICIES`, or `package.module:NAME` of a record elsewhere.

    Raises: UnknownPolicy.
    """
    if not isinstance(name, str):
        raise UnknownPolicy(f"policy must be a name, not {name!r}")
    if name in POLICIES:
        return POLICIES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(POLICIES)
        raise UnknownPolicy(f"policy must be one of {known}, or package.module:NAME, not {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # Whatever somebody else's module raises.
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UnknownPolicy(f"policy {name}: {why}") from error
    if not isinstance(found, Policy):
        raise UnknownPolicy(f"policy {name} is no {Policy.__module__}.Policy")
    return found
