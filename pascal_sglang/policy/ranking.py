"""The one ordering key of each policy: it admits, resumes and pauses (never two keys).

A rank is `(class, quanta)`; lower goes first. `priorities` puts more before these two. Only a
strictly lower rank may displace somebody, so equals never displace each other. Within a rank, `key`
orders. Requests that do not run stand in priority classes in which `key` orders them by rank too,
so that the queue need not be sorted anew in every pass. The records that name these functions are
in `registry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pascal_sglang.policy.request import Reader, RequestState, RequestStatus
from pascal_sglang.policy.timeline import Phase

# Its last two are the class and the quanta.
Rank = tuple[int, ...]

OVERDUE, URGENT, SETTLING, THINKING, DEMOTED, WHOLE, AHEAD = range(7)
HIGH, LOW = range(2)
URGENT_RANK, SETTLING_RANK, AHEAD_RANK = (URGENT, 0), (SETTLING, 0), (AHEAD, 0)

# Passes between the decision to bring an answer back and its next token.
REACTION_PASSES = 8

# Passes per token of the fastest reader that scheduling goes by. An answer gets ahead of such a
# reader while it runs, and can wait then. One that needs every pass never could, and would come
# first for ever.
PASSES_PER_TOKEN = 2

# Passes that a request whose whole prompt the device holds counts as having waited longer.
PREFIX_HEAD_START = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Numbers of the policies; token counts unless said otherwise.

    quantum: tokens a request runs before its rank falls behind those that ran less.
    demote: a thinker longer than this falls behind: by `demotion` quanta under `pascal`, behind all
        other thinkers under `paper`.
    demote_on: what counts towards that: `kv`, all tokens it generated, or `thinking`, its thinking
        tokens alone (they differ for models that write before they open their thinking).
    demotion: quanta that a demoted thinker counts as having run besides its own.
    ageing: quanta-lengths of passes a request waits to be forgiven one quantum.
    overdue: a thinker forgiven this many quanta more than it has run goes before answers too.
    stall_s: seconds that decode steps stand still for one pause and its return, as measured here.
    burst: an answer brought back is urgent until it has this many `stall_s` of lead.
    settle: until it has this many `stall_s` of lead, thinking does not displace it either. So the
        pauses of one answer stall the others for at most `1 / settle` of the time.
    guard: an answer this close to running dry, in tokens of its reader's pace, comes first.
    headroom: tokens somebody who starts must be able to grow by, unless it ends its phase sooner.
    tenant_bound: seconds of the whole pool by which a tenant gets ahead of another (`fairness`).
    backfill: quanta-lengths of passes that the first in line waits before nothing behind it starts.
    """

    quantum: int = 500
    demote: int = 5000
    demote_on: str = "kv"
    demotion: int = 4
    ageing: int = 32
    overdue: int = 2
    stall_s: float = 0.03
    burst: float = 50.0
    settle: float = 7500.0
    guard: int = 2
    headroom: int = 32
    backfill: int = 32
    tenant_bound: float = 5.0


@dataclass(frozen=True, slots=True)
class PassInfo:
    """When a plan is made."""

    # Number of the pass.
    pass_no: int
    # TP rank 0's clock at the start of the pass, in seconds: all ranks decide by this reading.
    now: float
    # Recent length of a pass of a busy engine, in seconds.
    pass_s: float
    # Tokens that a request gets in a pass, on average: more than one with speculative decoding.
    tokens: float = 1.0

    @property
    def token_s(self) -> float:
        """Recent seconds per token of a request that runs."""
        return self.pass_s / self.tokens


def fastest_pace(usual: float, pass_info: PassInfo) -> float:
    """The fastest pace, in seconds per token, that a request can ask for with effect. usual: the
    pace of requests that ask for none, which all are owed whether or not it can be delivered."""
    return min(usual, PASSES_PER_TOKEN * pass_info.token_s)


def credit_of(request: RequestState, tuning: Tuning) -> int:
    """Quanta forgiven for waiting, which last one quantum of running."""
    if (
        request.status is RequestStatus.RUNNING
        and request.total_tokens - request.ran_from >= tuning.quantum
    ):
        return 0
    return request.credit


def consumed_quanta(request: RequestState, tuning: Tuning) -> int:
    """Quanta run in this phase, with demotion, less what earlier waiting has earned."""
    consumed = request.phase_tokens // tuning.quantum
    if request.credit:
        consumed -= credit_of(request, tuning)
    if request.total_tokens > tuning.demote and is_demoted(request, tuning):
        return consumed + tuning.demotion
    return consumed


def quanta(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> int:
    """Consumed quanta in this phase, less what waiting has earned; negative after a long wait.

    Bound on starvation: no count grows while its request waits, so after
    `ageing * quantum * (consumed + overdue)` passes a waiting request is overdue. From then on it
    outranks every answer, and every thinker that has waited a quantum's ageing less than that.
    """
    consumed = consumed_quanta(request, tuning)
    if request.status is RequestStatus.RUNNING:
        return consumed
    waited = pass_info.pass_no - request.since_pass + request.head_start
    return consumed - waited // (tuning.ageing * tuning.quantum)


def served(request: RequestState, tuning: Tuning) -> float:
    """The pass at which a request of no quanta would have come to stand where this one stands: the
    order of `quanta` while everybody waits, without the clock."""
    consumed = consumed_quanta(request, tuning)
    stands_since = request.since_pass - request.head_start
    return consumed * tuning.ageing * tuning.quantum + stands_since


def overdue_at(request: RequestState, tuning: Tuning) -> float:
    """The pass in which a waiting request without a pace is overdue."""
    return served(request, tuning) + tuning.overdue * tuning.ageing * tuning.quantum


def is_demoted(request: RequestState, tuning: Tuning) -> bool:
    # total_tokens >= reasoning tokens, so this is a cheap early exit.
    if request.total_tokens <= tuning.demote or request.phase is not Phase.REASONING:
        return False
    return tuning.demote_on == "kv" or request.phase_tokens > tuning.demote


def pascal(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """Answers about to run dry, then those that have just come back, then thinking and answers that
    a program reads, then answers with slack. What has no reader and has waited for very long goes
    before all of them."""
    if request.phase is Phase.ANSWERING and has_pace(request):
        return answer_rank(request, pass_info, tuning)
    count = quanta(request, pass_info, tuning)
    return (THINKING if count > -tuning.overdue else OVERDUE, count)


def has_pace(request: RequestState) -> bool:
    """Whether a human reads what the request generates now: the answer can be ahead of its reader,
    and behind."""
    return request.phase is Phase.ANSWERING and request.reader is Reader.HUMAN


def answer_rank(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """The rank of an answer at a pace.

    The SLO guard: a running answer stays urgent until it has some lead, so that it does not come
    and go with every token; the first answering token is always urgent: TTFO waits. A running
    answer that is not urgent any more settles while its pause would be over too soon.
    """
    lead = urgent_at(request, tuning) - pass_info.now - REACTION_PASSES * pass_info.pass_s
    if request.status is not RequestStatus.RUNNING:
        return URGENT_RANK if lead < 0 else AHEAD_RANK
    if lead < tuning.burst * tuning.stall_s:
        return URGENT_RANK
    return SETTLING_RANK if lead < tuning.settle * tuning.stall_s else AHEAD_RANK


def urgent_at(request: RequestState, tuning: Tuning) -> float:
    """When a paused answer has to come back, in seconds; at once before its first token."""
    pacer = request.pacer
    if not pacer.delivered:
        return -math.inf
    return pacer.shown + (1 - tuning.guard) * pacer.pace


def paper(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """The paper: strict priority of thinking; both queues round robin on consumed quanta."""
    return (paper_class(request, tuning), by_quanta(request, tuning))


def round_robin(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """Phase-blind round robin: quanta counted over the whole request."""
    return (HIGH, by_all_quanta(request, tuning))


def round_robin_restart(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """Round robin whose count starts again at the phase boundary."""
    return (HIGH, by_quanta(request, tuning))


def by_quanta(request: RequestState, tuning: Tuning) -> int:
    return request.phase_tokens // tuning.quantum


def by_all_quanta(request: RequestState, tuning: Tuning) -> int:
    return request.total_tokens // tuning.quantum


def pascal_key(request: RequestState, tuning: Tuning) -> float:
    """Answers at a pace: which has to come back first; all others: which has been served least."""
    if has_pace(request):
        return urgent_at(request, tuning)
    return served(request, tuning)


def pascal_class(request: RequestState, tuning: Tuning) -> int:
    if request.phase is Phase.ANSWERING:
        return AHEAD if request.reader is Reader.HUMAN else WHOLE
    return DEMOTED if is_demoted(request, tuning) else THINKING


def paper_class(request: RequestState, tuning: Tuning) -> int:
    return LOW if request.phase is Phase.ANSWERING or is_demoted(request, tuning) else HIGH


def nobody_first(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    """FCFS: no request displaces another."""
    return (HIGH, 0)


def by_arrival(request: RequestState, tuning: Tuning) -> float:
    return float(request.seq)


def one_class(request: RequestState, tuning: Tuning) -> int:
    return HIGH
