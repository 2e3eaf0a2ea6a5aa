"""What is compared: a scheduling policy inside instances, and what happens between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pascal_sglang.policy.ranking import ORDERS, Moment, Order, Rank, Tuning
from pascal_sglang.policy.request import Member
from pascal_sglang.sim.rank_forecast import Foresight


def _nobody_first(member: Member, moment: Moment, tuning: Tuning) -> Rank:
    return (0, 0)


def _arrival(member: Member, tuning: Tuning) -> float:
    return float(member.seq)


def _one_lane(member: Member, tuning: Tuning) -> int:
    return 0


# The paper's FCFS: nobody displaces anybody; who came last gives way when memory runs out.
FCFS = Order(_nobody_first, _arrival, _one_lane, ("all",), worst=(0, 0))

STOCK = "sglang"
SIM_ORDERS = {**ORDERS, "fcfs": FCFS}
FORESIGHTS = {
    "fcfs": Foresight(),
    "rr": Foresight(quanta="all"),
    "rr-restart": Foresight(quanta="phase"),
    "paper": Foresight(quanta="phase", demotes=True),
    "pascal": Foresight(quanta="phase", demotes=True, paced=True),
    STOCK: Foresight(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """order: one of `SIM_ORDERS`, or SGLang's own scheduling.

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
    order: str
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
    order="paper",
    on_pace=True,
    sticky=True,
    optimistic=False,
    migration="adaptive",
)
PASCAL = Arm(
    name="pascal",
    order="pascal",
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
        Arm(name=STOCK, order=STOCK),
        Arm(name="fcfs", order="fcfs"),
        Arm(name="rr", order="rr"),
        Arm(name="rr-restart", order="rr-restart"),
        PAPER,
        PAPER.but("paper-no-migration", migration="off"),
        PAPER.but("paper-non-adaptive", migration="always"),
        PAPER.but("paper-live", live=True),
        PASCAL,
        PASCAL.but("pascal-no-migration", migration="off"),
        PASCAL.but("pascal-stop-and-copy", live=False),
    )
}
