"""When a running request's rank may get worse next: the only thing in it that calls for a plan."""

from __future__ import annotations

from dataclasses import dataclass

from pascal_sglang.policy.ranking import REACTION_PASSES, Tuning, is_demoted
from pascal_sglang.policy.timeline import Phase
from pascal_sglang.sim.request import Job

NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Foresight:
    """What a policy's rank looks at.

    quanta: tokens of the `phase`, of the whole request (`all`), or of nothing. demotes: whether
    long thinking falls behind. paced: whether answers get out of their hurry.
    """

    quanta: str = ""
    demotes: bool = False
    paced: bool = False

    def steps(self, job: Job, tuning: Tuning, step_s: float, now: float, pass_s: float) -> int:
        """Decode steps until the rank of a member that is up to date may get worse, if steps go on
        to take `step_s`; early rather than late where that is a guess."""
        found = NEVER
        if self.quanta:
            counted = job.phase_tokens if self.quanta == "phase" else job.total_tokens
            found = tuning.quantum - counted % tuning.quantum
        if job.phase is Phase.REASONING:
            if self.demotes and not is_demoted(job, tuning):
                counted = job.total_tokens if tuning.demote_on == "kv" else job.phase_tokens
                found = min(found, tuning.demote + 1 - counted)
        elif self.paced:
            found = min(found, _calm_in(job, tuning, step_s, now, pass_s))
        if job.credit > 0:
            runs_out = job.ran_from + tuning.quantum - job.total_tokens
            if runs_out > 0:
                found = min(found, runs_out)
        return found


def _calm_in(job: Job, tuning: Tuning, step_s: float, now: float, pass_s: float) -> int:
    """Steps until a running answer has built up the lead after which it is not urgent any more, or
    after which thinking may displace it (`policy.order.is_urgent`, `is_settling`)."""
    tpot = job.pacer.tpot
    if not job.pacer.delivered:
        return 1
    if step_s >= tpot:
        return NEVER
    shown = max(job.pacer.last_shown, now + step_s - tpot)
    for lead in sorted((tuning.burst, tuning.settle * tuning.quantum)):
        short = now + REACTION_PASSES * pass_s - shown + (tuning.guard - 1 + lead) * tpot
        if short > 0:
            return max(1, int(short / (tpot - step_s)))
    return NEVER
