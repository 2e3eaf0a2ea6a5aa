"""What is compared: a scheduling policy inside instances, and what happens between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pascal_sglang.policy.ranking import POLICIES, PassInfo, Policy, Rank, Tuning
from pascal_sglang.policy.request import RequestState
from pascal_sglang.sim.rank_forecast import RankForecast


def _nobody_first(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    return (0, 0)


def _arrival(request: RequestState, tuning: Tuning) -> float:
    return float(request.seq)


def _one_lane(request: RequestState, tuning: Tuning) -> int:
    return 0


# The paper's FCFS: nobody displaces anybody; who came last gives way when memory runs out.
FCFS = Policy(_nobody_first, _arrival, _one_lane, ("all",), worst=(0, 0))

STOCK = "sglang"
SIM_POLICIES = {**POLICIES, "fcfs": FCFS}
FORESIGHTS = {
    "fcfs": RankForecast(),
    "rr": RankForecast(quanta="all"),
    "rr-restart": RankForecast(quanta="phase"),
    "paper": RankForecast(quanta="phase", demotes=True),
    "pascal": RankForecast(quanta="phase", demotes=True, paced=True),
    STOCK: RankForecast(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """order: one of `SIM_POLICIES`, or SGLang's own scheduling.

    on_pace: new requests avoid instances that miss their objective (Algorithm 1).
    sticky: the paper's status, running QoE; otherwise whether somebody waits now.
    optimistic: what was just decided counts before the next status says so (against herding).
    migration: `off`, `adaptive`, or `always`, which ignores the adaptive override.
    lazy: move only from memory pressure to room. live: copy while the source decodes.
    prefixes: a prefix that an instance was sent before weighs in its favour.
    predict: new requests go where their answer is expected first, not to the smallest footprint.
    tuning: numbers of the policy that differ from `Tuning`.
    """

    name: str
    policy: str
    on_pace: bool = False
    sticky: bool = False
    optimistic: bool = True
    migration: str = "off"
    lazy: bool = False
    live: bool = False
    prefixes: bool = False
    predict: bool = False
    tuning: tuple[tuple[str, float | str], ...] = ()

    def but(self, name: str, **changes: object) -> Arm:
        """The same arm with something changed, under another name."""
        return dataclasses.replace(self, name=name, **changes)  # type: ignore[arg-type]


PAPER = Arm(
    name="paper",
    policy="paper",
    on_pace=True,
    sticky=True,
    optimistic=False,
    migration="adaptive",
)
PASCAL = Arm(
    name="pascal",
    policy="pascal",
    on_pace=True,
    migration="adaptive",
    lazy=True,
    live=True,
    prefixes=True,
    predict=True,
)
ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=STOCK, policy=STOCK),
        Arm(name="fcfs", policy="fcfs"),
        Arm(name="rr", policy="rr"),
        Arm(name="rr-restart", policy="rr-restart"),
        PAPER,
        PAPER.but("paper-no-migration", migration="off"),
        PAPER.but("paper-non-adaptive", migration="always"),
        PAPER.but("paper-live", live=True),
        PASCAL,
        PASCAL.but("pascal-no-migration", migration="off"),
        PASCAL.but("pascal-stop-and-copy", live=False),
    )
}
