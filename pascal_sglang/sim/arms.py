"""What is compared: a scheduling policy inside instances, and what happens between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pascal_sglang.policy.priorities import Priorities, with_priorities
from pascal_sglang.policy.ranking import Tuning
from pascal_sglang.policy.registry import Policy, UnknownPolicy, find

STOCK = "sglang"
# A better priority displaces, however little better it is.
PREEMPTING = Priorities(threshold=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """policy: its name (`policy.registry.find`), or `STOCK` for SGLang's own scheduling.

    on_pace: new requests avoid instances that miss their objective (Algorithm 1).
    sticky: the paper's status, running QoE; otherwise whether somebody waits now.
    optimistic: what was just decided counts before the next status says so (against herding).
    migration: `off`, `adaptive`, or `always`, which ignores the adaptive override: a target takes
        what it is sent, into host memory where the device has no room.
    unlimited: KV memory without a limit, to show what the memory costs every other arm.
    lazy: move only from memory pressure to room. live: copy while the source decodes.
    near: a request moves to a near instance among alike ones, in a topology.
    prefixes: a prefix that an instance was sent before weighs in its favour.
    predict: new requests go where their answer is expected first, not to the smallest footprint.
    backfills: whether requests start behind a first in line that does not fit; None: as the policy
        says.
    priorities: how far the priority of interactive requests goes under a policy that schedules;
        None: it is ignored.
    fairness: whether tenants are told apart, in a load that has some.
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
    near: bool = True
    prefixes: bool = False
    predict: bool = False
    unlimited: bool = False
    backfills: bool | None = None
    priorities: Priorities | None = PREEMPTING
    fairness: bool = False
    tuning: tuple[tuple[str, float | str], ...] = ()

    @property
    def record(self) -> Policy | None:
        """All that is known of the policy; None for SGLang's own scheduling."""
        if self.policy == STOCK:
            return None
        policy = find(self.policy)
        if self.backfills is None:
            return policy
        return dataclasses.replace(policy, backfills=self.backfills)

    @property
    def prioritised(self) -> Policy | None:
        """The policy for a load in which requests differ in priority; None where the arm ignores
        priorities."""
        policy = self.record
        if policy is None or not policy.schedules or self.priorities is None:
            return None
        return with_priorities(policy, self.priorities)

    def but(self, name: str, **changes: object) -> Arm:
        """The same arm with something changed, under another name."""
        return dataclasses.replace(self, name=name, **changes)  # type: ignore[arg-type]


INF = Arm(name="INF", policy="fcfs", predict=True, unlimited=True)
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
        # Told apart from `pascal` by nothing but the order.
        PASCAL.but("rr-restart+", policy="rr-restart", backfills=True),
        PAPER,
        PAPER.but("paper-no-migration", migration="off"),
        PAPER.but("paper-non-adaptive", migration="always"),
        PAPER.but("paper-live", live=True),
        PASCAL,
        PASCAL.but("pascal-migration", migration="adaptive"),
        PASCAL.but("pascal-stop-and-copy", migration="adaptive", live=False),
        PASCAL.but("pascal-no-priorities", priorities=None),
        PASCAL.but("pascal-fair", fairness=True),
        INF,
    )
}


def with_inf(arms: Sequence[Arm]) -> list[Arm]:
    """The arms, and `INF` after them: a figure that is as bad there is not the policy's doing."""
    return [*(arm for arm in arms if arm != INF), INF]


def arm_of(name: str) -> Arm:
    """One of `ARMS`, or the policy of that name with all that this package does around it. After an
    `@`, fields of `Tuning` follow: `pascal@settle=1500+ageing=8`.

    Raises: UnknownPolicy.
    """
    base, tuned, numbers = name.partition("@")
    if tuned:
        return arm_of(base).but(name, tuning=tuple(_number(each) for each in numbers.split("+")))
    if name in ARMS:
        return ARMS[name]
    rule = find(name).placement
    if rule is None:
        return Arm(name=name, policy=name)
    return PASCAL.but(
        name,
        policy=name,
        sticky=rule.running_qoe,
        migration="adaptive" if rule.migrates else "off",
        lazy=rule.lazy,
        predict=rule.predict,
    )


def _number(text: str) -> tuple[str, float]:
    """A number of `Tuning`, from `field=value`."""
    field, _, value = text.partition("=")
    kinds = {each.name: type(each.default) for each in dataclasses.fields(Tuning)}
    kind = kinds.get(field)
    try:
        if kind in (int, float):
            return field, kind(value)
    except ValueError:
        pass
    known = ", ".join(name for name, kind in kinds.items() if kind is not str)
    raise UnknownPolicy(f"{text!r} is not FIELD=NUMBER with a field of {known}")
