"""When prefills stand back for moves: a reader is waiting, and a long prefill takes many steps."""

from __future__ import annotations

# A request that stops elsewhere is here this many passes later, and has produced a token.
HANDOVER_PASSES = 8


class PrefillGate:
    """Defers prefills while somebody changes instances, at most `HANDOVER_PASSES` passes in a row;
    then prefills have as many for themselves."""

    def __init__(self) -> None:
        self._until = 0
        self._deferred = 0
        self._free_until = 0

    def ask(self, pass_no: int, passes: int) -> None:
        """Somebody stops now or soon: no prefill in this pass and those after it, `passes` in all,
        unless it is over before."""
        self._until = max(self._until, pass_no + passes)

    def defers(self, pass_no: int, *, prefill_waits: bool, moving: bool) -> bool:
        """Whether the prefill of this pass stands back. moving: a move is under way here, or has
        ended and its request has no token yet."""
        wanted = moving and self._free_until <= pass_no < self._until
        if not (wanted and prefill_waits):
            self._deferred = 0
            return False
        self._deferred += 1
        if self._deferred == HANDOVER_PASSES:
            self._free_until = pass_no + 1 + HANDOVER_PASSES
        return True
