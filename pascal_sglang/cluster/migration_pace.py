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
# What a piece takes on a network that carries it beside the decoding, in seconds: many times the
# delay of most networks, and a small part of what the sides of a move wait for each other.
NETWORK_S = 0.25


@dataclass(slots=True)
class NetworkPace:
    """Sizes the pieces that a network carries while the scheduler goes on: so large that each takes
    about `NETWORK_S`. The first one is small, and each has twice as much as one before at most, so
    that a slow link is found out by little. Lengths in tokens, the same on all TP ranks."""

    window_tokens: int
    piece_tokens: int = PIECE_TOKENS

    def went(self, tokens: int, seconds: float) -> None:
        """A piece has arrived. A short one says nothing of longer ones, unless it is slow."""
        scale = min(2.0, NETWORK_S / max(seconds, 1e-9))
        if scale <= 1 or 2 * tokens > self.piece_tokens:
            self._scale(scale)

    def pieces(self, kv_tokens: int) -> int:
        """Those that so many KV entries go in, if each has twice as much as the one before."""
        count, piece = 0, self.piece_tokens
        while kv_tokens > 0:
            kv_tokens, piece, count = (
                kv_tokens - piece,
                min(2 * piece, self.window_tokens),
                count + 1,
            )
        return count

    def failed(self) -> None:
        """A piece did not arrive, or took too long."""
        self._scale(0.25)

    def _scale(self, scale: float) -> None:
        tokens = int(self.piece_tokens * max(0.25, scale))
        self.piece_tokens = max(PIECE_TOKENS, min(self.window_tokens, tokens))


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
    # Where a network carries the pieces; it alone says how large they are.
    network: NetworkPace | None = None
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
        if self.network is not None:
            return self.network.piece_tokens
        if not self.token_s or not self.pass_s:
            return None
        carried = self.share * self.pass_s / self.token_s / max(1, moves)
        return max(PIECE_TOKENS, int(carried))

    def passes(self, kv_tokens: int, moves: int) -> int:
        """Passes that moving a request of so many KV entries takes, as one of so many moves."""
        if self.network is not None:
            pieces = self.network.pieces(kv_tokens)
        else:
            link = self.link_tokens(moves) or self.window_tokens
            pieces = math.ceil(kv_tokens / min(self.window_tokens, link))
        return PASSES + math.ceil(pieces * self.passes_per_piece)

    def growth(self, kv_tokens: int, moves: int) -> int:
        """Tokens to reserve for what it gains meanwhile."""
        return GROWTH + 2 * self.passes(kv_tokens, moves) * self.step_tokens

    @property
    def spare(self) -> int:
        """Of these, what is left for tokens that arrive while it stops: those of the step in flight
        and of the next one."""
        return 2 * self.step_tokens
