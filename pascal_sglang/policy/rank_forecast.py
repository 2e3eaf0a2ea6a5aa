"""When the rank of a running request may get worse next, so that a simulator can skip passes."""

from __future__ import annotations

from dataclasses import dataclass

from pascal_sglang.policy.ranking import REACTION_PASSES, Tuning, has_pace, is_demoted
from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase

NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class RankForecast:
    """What the rank of a policy looks at."""

    # Tokens that count: of the `phase`, of the whole request (`all`), or none.
    quanta: str = ""
    # Whether long thinking falls behind.
    demotes: bool = False
    # Whether answers get out of their hurry.
    paced: bool = False
    # Whether a rank may change in any pass: always right, and slow to simulate.
    any_pass: bool = False

    def steps(
        self, request: RequestState, tuning: Tuning, step_s: float, now: float, pass_s: float
    ) -> int:
        """Decode steps until the rank of a request that is up to date may get worse, if steps go
        on to take `step_s`; early rather than late where that is a guess."""
        if self.any_pass:
            return 1
        found = NEVER
        if self.quanta:
            counted = request.phase_tokens if self.quanta == "phase" else request.total_tokens
            found = tuning.quantum - counted % tuning.quantum
        if request.phase is Phase.REASONING:
            if self.demotes and not is_demoted(request, tuning):
                counted = request.total_tokens if tuning.demote_on == "kv" else request.phase_tokens
                found = min(found, tuning.demote + 1 - counted)
        elif self.paced and has_pace(request):
            found = min(found, _calm_in(request, tuning, step_s, now, pass_s))
        if request.credit > 0:
            runs_out = request.ran_from + tuning.quantum - request.total_tokens
            if runs_out > 0:
                found = min(found, runs_out)
        return found


def _calm_in(
    request: RequestState, tuning: Tuning, step_s: float, now: float, pass_s: float
) -> int:
    """Steps until a running answer has built up the lead after which it is not urgent any more, or
    after which thinking may displace it (`policy.ranking.answer_rank`)."""
    tpot = request.pacer.tpot
    if not request.pacer.delivered:
        return 1
    request.pacer.settle()
    if step_s >= tpot:
        return NEVER
    shown = max(request.pacer.last_shown, now + step_s - tpot)
    for stalls in sorted((tuning.burst, tuning.settle)):
        lead = (tuning.guard - 1) * tpot + stalls * tuning.stall_s
        short = now + REACTION_PASSES * pass_s - shown + lead
        if short > 0:
            return max(1, int(short / (tpot - step_s)))
    return NEVER
