"""One request in the simulator: the policy's state, and what only the simulator knows."""

from __future__ import annotations

from dataclasses import dataclass

from pascal_sglang.policy.request import RequestState
from pascal_sglang.policy.timeline import Phase


@dataclass(slots=True, eq=False, kw_only=True)
class SimRequest(RequestState):
    """A request that runs is brought up to date when somebody looks at it (`Batch.sync`).

    index: its place in the workload. prompt, reasoning, answer: tokens, `reasoning` with the
        end-of-thinking marker. talk, history: its conversation, and the prompt tokens that came
        before in it. cached: those of them that its instance still has.
    step, at: the decode step, and its time (s), up to which it is up to date.
    due: at which step something happens to it; 0: not in the batch.
    unfilled: tokens still to be prefilled.
    first_token, reasoning_end, first_answer: seconds; negative until it happened.
    """

    index: int
    arrival: float
    prompt: int
    reasoning: int
    answer: int
    talk: int = -1
    history: int = 0
    cached: int = 0
    step: int = 0
    at: float = 0.0
    due: int = 0
    unfilled: int = 0
    first_token: float = -1.0
    reasoning_end: float = -1.0
    first_answer: float = -1.0
    pauses: int = 0
    moved: int = 0
    # The migration under way (`sim.migration.Migration`), compared by identity.
    migration: object | None = None

    @property
    def held(self) -> int:
        """KV entries of a request that has produced a token; the last token has none yet."""
        return self.prompt + self.total_tokens - 1

    @property
    def left(self) -> int:
        """Tokens still to come in this phase."""
        whole = self.reasoning if self.phase is Phase.REASONING else self.answer
        return whole - self.phase_tokens
