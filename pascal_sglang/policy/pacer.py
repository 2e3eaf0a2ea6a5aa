"""The reader's side of an answer: when each token is shown, when the buffer runs dry, how it went.

Source: PAPER.md, "token pacer" and "QoE" (Andes' metric computed from TPOT alone).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pacer:
    """One answer's reader, who takes in a token every `tpot` seconds once the first has arrived.

    Token i is shown at `max(delivered_i, shown_{i-1} + tpot)`. Times are seconds of one clock.
    """

    tpot: float
    delivered: int = 0
    first_shown: float = 0.0
    last_shown: float = 0.0
    delay: float = 0.0

    def deliver(self, now: float, tokens: int) -> None:
        """`tokens` more answering tokens reached the stream at `now`."""
        for _ in range(tokens):
            if self.delivered == 0:
                self.first_shown = self.last_shown = now
            else:
                self.last_shown = max(now, self.last_shown + self.tpot)
            self.delay += self.last_shown - self._ideal(self.delivered)
            self.delivered += 1

    def _ideal(self, index: int) -> float:
        return self.first_shown + index * self.tpot

    def slack(self, now: float) -> float:
        """Seconds until the reader misses a token; negative once one is missed or none has come."""
        return self.last_shown + self.tpot - now if self.delivered else -self.tpot

    @property
    def qoe(self) -> float:
        """`1 - S_delay / S_whole`, in [0, 1].

        `S_delay` sums how late each token was shown; `S_whole` sums how long before the end (one
        `tpot` after the last token was shown) each was due.
        """
        if self.delivered == 0:
            return 1.0
        end = self.last_shown + self.tpot
        due = self.delivered * (self.first_shown + self._ideal(self.delivered - 1)) / 2
        whole = self.delivered * end - due
        return min(1.0, max(0.0, 1.0 - self.delay / whole))
