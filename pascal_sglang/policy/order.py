"""The one ordering key of each policy: it admits, resumes and pauses (DESIGN: never two keys).

A rank is `(class, quanta)`; lower goes first. Only a strictly lower rank may displace somebody, so
equals never displace each other. Within a rank, `tie` orders: by arrival, or by who runs dry first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pascal_sglang.policy.member import Member, Place
from pascal_sglang.policy.timeline import Phase

Rank = tuple[int, int]

URGENT, THINKING, DEMOTED, AHEAD = range(4)
HIGH, LOW = range(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Numbers of the policies; token counts unless said otherwise.

    quantum: tokens a request runs before its rank falls behind those that ran less.
    demote: a thinker longer than this loses its place before all other thinkers.
    ageing: quanta-lengths of passes a request waits to be forgiven one quantum.
    burst: an answer brought back builds up this many tokens of lead before it may be paused again.
    guard: an answer this close to running dry, in tokens of its reader's pace, comes first.
    """

    quantum: int = 500
    demote: int = 5000
    ageing: int = 2
    burst: int = 24
    guard: int = 2


@dataclass(frozen=True, slots=True)
class Moment:
    """When a plan is made: the pass number, the clock (s), the recent length of a pass (s)."""

    pass_no: int
    now: float
    pass_s: float


Key = Callable[[Member, Moment, Tuning], Rank]


def quanta(member: Member, moment: Moment, tuning: Tuning) -> int:
    """Consumed quanta in this phase, less what waiting has earned; negative after a long wait.

    Bound on starvation: nobody's count grows while it waits, so after at most
    `ageing * quantum * (quanta + 1)` passes a waiting request outranks every request of its class
    that has not waited as long.
    """
    consumed = member.phase_tokens // tuning.quantum
    if member.place is Place.RUNNING:
        return consumed - member.credit
    waited = moment.pass_no - member.since_pass
    return consumed - member.credit - waited // (tuning.ageing * tuning.quantum)


def is_demoted(member: Member, tuning: Tuning) -> bool:
    return member.phase is Phase.REASONING and member.total_tokens > tuning.demote


def pascal(member: Member, moment: Moment, tuning: Tuning) -> Rank:
    """Answers about to run dry, then thinking, then demoted thinking, then answers with slack."""
    if member.phase is Phase.ANSWERING:
        return (URGENT if is_urgent(member, moment, tuning) else AHEAD, 0)
    demoted = is_demoted(member, tuning)
    return (DEMOTED if demoted else THINKING, quanta(member, moment, tuning))


def is_urgent(member: Member, moment: Moment, tuning: Tuning) -> bool:
    """The SLO guard. A running answer stays urgent until it has a burst of lead, so that it does
    not come and go with every token; the first answering token is always urgent: TTFO waits."""
    tpot = member.pacer.tpot
    guard = tuning.guard * tpot + 4 * moment.pass_s
    if member.place is Place.RUNNING:
        guard += tuning.burst * tpot
    return member.pacer.slack(moment.now) < guard


def paper(member: Member, moment: Moment, tuning: Tuning) -> Rank:
    """PAPER.md: strict priority of thinking; both queues round robin on consumed quanta."""
    low = member.phase is Phase.ANSWERING or is_demoted(member, tuning)
    return (LOW if low else HIGH, member.phase_tokens // tuning.quantum)


def round_robin(member: Member, moment: Moment, tuning: Tuning) -> Rank:
    """Phase-blind round robin: quanta counted over the whole request."""
    return (0, member.total_tokens // tuning.quantum)


def round_robin_restart(member: Member, moment: Moment, tuning: Tuning) -> Rank:
    """Round robin whose count starts again at the phase boundary."""
    return (0, member.phase_tokens // tuning.quantum)


def by_arrival(member: Member, moment: Moment) -> float:
    return member.seq


def by_dryness(member: Member, moment: Moment) -> float:
    """Answers: who runs dry first; thinkers: arrival."""
    if member.phase is Phase.ANSWERING:
        return member.pacer.slack(moment.now)
    return member.seq


@dataclass(frozen=True, slots=True)
class Order:
    """A policy: its rank and what orders equals."""

    rank: Key
    tie: Callable[[Member, Moment], float]


ORDERS = {
    "pascal": Order(pascal, by_dryness),
    "paper": Order(paper, by_arrival),
    "rr": Order(round_robin, by_arrival),
    "rr-restart": Order(round_robin_restart, by_arrival),
}
