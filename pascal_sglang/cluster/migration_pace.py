"""How fast moves from an instance go, learned from those before.

A move has to say at its start how much the request may still grow until it stops, and how long it
takes. Both follow from the number of pieces that its KV goes in, and from the passes that a piece
takes, in the network, on two devices and in two schedulers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pascal_sglang.policy.running_mean import running_mean

# Passes that a move takes besides those of its pieces: asking, stopping, handing over.
PASSES = 4
# Tokens that every move may gain, beside those of as many passes again as are expected.
GROWTH = 64
# A piece has so many tokens at least, whatever the link carries.
PIECE_TOKENS = 16
# A Handover waits for the step in flight, too: only a long one says how fast KV goes.
MEASURED_HANDOVER_TOKENS = 256
# Of a pass, what pieces may take for which the scheduler waits.
WAITED_SHARE = 0.25


@dataclass(slots=True)
class MigrationPace:
    """Lengths in tokens, times in seconds.

    window_tokens: the largest piece. step_tokens: what a request gains in a pass at most.
    token_s: what a token takes on the link; None until it is known. passes_per_piece: of two pieces
    in flight, a new one is begun every so many passes. pass_s: recent length of a busy pass without
    what pieces have added to it, 0 until it is known; pieces may take a `share` of it. All are the
    same on all TP ranks.
    """

    window_tokens: int
    step_tokens: int = 1
    token_s: float | None = None
    passes_per_piece: float = 2.0
    pass_s: float = 0.0
    share: float = 1.0
    # A mean over recent pieces; what was measured at the start counts as one of the largest.
    _tokens: float = 0.0
    _seconds: float = 0.0
    # Seconds that the scheduler has waited for pieces in this pass.
    _waited_s: float = 0.0

    def __post_init__(self) -> None:
        if self.token_s:
            self._tokens = float(self.window_tokens)
            self._seconds = self.token_s * self._tokens

    def copied(self, passes: int, pieces: int) -> None:
        """Copying beside the decoding has ended, for good or because the reservation was full: so
        many pieces went in so many passes."""
        if pieces:
            self.passes_per_piece = running_mean(self.passes_per_piece, passes / pieces)

    def passed(self, seconds: float | None) -> None:
        """A pass is over. seconds: its length; None where that says nothing of a step's."""
        if seconds is not None:
            alone = max(0.0, seconds - self._waited_s)
            self.pass_s = running_mean(self.pass_s or None, alone)
        self._waited_s = 0.0

    def went(self, tokens: int, tokens_per_s: float, *, stopped: bool = False) -> None:
        """A piece has gone, for which the scheduler waited. Recent ones count more, and long ones
        more than short ones. stopped: it was that of a Handover."""
        if not 0 < tokens_per_s < math.inf:
            return
        self._waited_s += tokens / tokens_per_s
        if tokens < (MEASURED_HANDOVER_TOKENS if stopped else PIECE_TOKENS):
            return
        self._tokens = 0.9 * self._tokens + tokens
        self._seconds = 0.9 * self._seconds + tokens / tokens_per_s
        self.token_s = self._seconds / self._tokens

    def link_tokens(self, moves: int) -> int | None:
        """What a piece of each of so many moves has at most, for the link to carry them in a pass;
        None if that is not known."""
        if not self.token_s or not self.pass_s:
            return None
        carried = self.share * self.pass_s / self.token_s / max(1, moves)
        return max(PIECE_TOKENS, int(carried))

    def passes(self, kv_tokens: int, moves: int) -> int:
        """Passes that moving a request of so many KV entries takes, as one of so many moves."""
        link, piece = self.link_tokens(moves), self.window_tokens
        if link is not None:
            piece = min(piece, link)
        return PASSES + math.ceil(math.ceil(kv_tokens / piece) * self.passes_per_piece)

    def growth(self, kv_tokens: int, moves: int) -> int:
        """Tokens to reserve for what it gains meanwhile."""
        return GROWTH + 2 * self.passes(kv_tokens, moves) * self.step_tokens

    @property
    def spare(self) -> int:
        """Of these, what is left for tokens that arrive while it stops: those of the step in flight
        and of the next one."""
        return 2 * self.step_tokens
