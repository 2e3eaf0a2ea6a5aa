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

    def deliver(self, now: float, tokens: int, every: float = 0.0) -> None:
        """`tokens` more answering tokens reach the stream, the first at `now`, the others `every`
        seconds apart; the cost does not depend on how many."""
        if tokens > 0 and self.delivered == 0:
            self.first_shown = self.last_shown = now
            self.delivered = 1
            tokens, now = tokens - 1, now + every
        if tokens <= 0:
            return
        due = self.last_shown + self.tpot
        buffered = tokens
        if every > self.tpot:
            # The stream is slower than the reader: a lead lasts for some tokens, if there is one.
            lead = (due - now) / (every - self.tpot)
            buffered = min(tokens, int(lead) + 1) if lead >= 0 else 0
        if buffered:
            self.last_shown = max(now, due) + (buffered - 1) * self.tpot
            self.delivered += buffered
            self.delay += buffered * (self.last_shown - self._ideal(self.delivered - 1))
        if late := tokens - buffered:
            first, self.last_shown = now + buffered * every, now + (tokens - 1) * every
            begin = first - self._ideal(self.delivered)
            self.delivered += late
            end = self.last_shown - self._ideal(self.delivered - 1)
            self.delay += late * (begin + end) / 2

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
