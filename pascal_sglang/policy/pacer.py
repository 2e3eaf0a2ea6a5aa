"""The reader's side of an answer: when each token is shown, when the buffer runs dry, how it went.

Source: the paper, "token pacer" and "QoE" (Andes' metric computed from TPOT alone).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Pacer:
    """One answer's reader, who takes in a token every `tpot` seconds once the first has arrived.

    Token i is shown at `max(delivered_i, shown_{i-1} + tpot)`. Times are seconds of one clock.

    Quality is measured at `tpot`. Scheduling goes by `pace`, which is slower where `tpot` is faster
    than the engine delivers: a request that nobody could serve at its pace is served like others.

    delivered: tokens that are accounted for in the times and in the delay.
    floor: seconds per token that `pace` is no faster than.
    ahead: seconds between `last_shown` and when the last token would be shown at `pace`.
    received: tokens that have come, where these are more than `delivered`. All of the others came
        before their turn, so that one is shown every `tpot`, and `settle` accounts for them.
    early_until: a token that comes by then comes before its turn; negative if that is not known.
    """

    tpot: float
    delivered: int = 0
    first_shown: float = 0.0
    last_shown: float = 0.0
    delay: float = 0.0
    floor: float = 0.0
    ahead: float = 0.0
    received: int = 0
    early_until: float = -1.0

    @property
    def pace(self) -> float:
        """Seconds per token that scheduling holds the answer to."""
        return self.tpot if self.tpot > self.floor else self.floor

    @property
    def shown(self) -> float:
        """When the last token would be shown at `pace`."""
        early = self.received - self.delivered
        return self.last_shown + (early * self.tpot if early > 0 else 0.0) + self.ahead

    def deliver(self, now: float, tokens: int, every: float = 0.0, floor: float = 0.0) -> None:
        """`tokens` more answering tokens reach the stream, the first at `now`, the others `every`
        seconds apart; the cost does not depend on how many. floor: the fastest pace that the engine
        delivers now, in seconds per token."""
        if self.received > self.delivered:
            self.settle()
        if floor <= self.tpot and not self.ahead:
            self._show(now, tokens, every)
            self.floor = floor
            return
        before = self.shown if self.delivered else -math.inf
        self._show(now, tokens, every)
        self.floor = floor
        if tokens > 0:
            last = now + (tokens - 1) * max(every, self.pace)
            self.ahead = max(0.0, max(last, before + tokens * self.pace) - self.last_shown)

    def receive(self, now: float, received: int, floor: float) -> None:
        """`received` answering tokens have reached the stream in all, the new ones at `now`.

        floor: as in `deliver`. Up to `early_until`, while `floor` is not above `tpot`, setting
        `received` says as much.
        """
        if self.received > self.delivered:
            self.settle()
        tokens, tpot = received - self.delivered, self.tpot
        if self.delivered and not self.ahead and floor <= tpot:
            # As `deliver` does, in one step: answers whose readers wait come by here in every pass.
            due = self.last_shown + tpot
            self.last_shown = (now if now > due else due) + (tokens - 1) * tpot
            self.delay += tokens * (self.last_shown - self.first_shown - (received - 1) * tpot)
            self.delivered = received
            self.floor = floor
        else:
            self.deliver(now, tokens, floor=floor)
        self.received = received
        self.early_until = self.last_shown + tpot if floor <= tpot and not self.ahead else -1.0

    def settle(self) -> None:
        """Account for the tokens that came before their turn.

        Only what all ranks of an instance do alike may call this: it changes the last digits of
        later sums. Reading `shown`, `slack` or `qoe` changes nothing.
        """
        if self.received > self.delivered:
            self.delivered, self.last_shown, self.delay = self._accounted()
            self.early_until = self.last_shown + self.tpot

    def _accounted(self) -> tuple[int, float, float]:
        """`delivered`, `last_shown` and `delay` with the tokens that came before their turn."""
        early = self.received - self.delivered
        if early <= 0:
            return self.delivered, self.last_shown, self.delay
        last_shown = self.last_shown + early * self.tpot
        late = last_shown - self._ideal(self.received - 1)
        return self.received, last_shown, self.delay + early * late

    def _show(self, now: float, tokens: int, every: float) -> None:
        if tokens > 0 and self.delivered == 0:
            self.first_shown = self.last_shown = now
            self.delivered = 1
            tokens, now = tokens - 1, now + every
        if tokens <= 0:
            return
        tpot = self.tpot
        due = self.last_shown + tpot
        buffered = tokens
        if every > tpot:
            # The stream is slower than the reader: a lead lasts for some tokens, if there is one.
            lead = (due - now) / (every - tpot)
            buffered = min(tokens, int(lead) + 1) if lead >= 0 else 0
        if buffered:
            self.last_shown = (now if now > due else due) + (buffered - 1) * tpot
            self.delivered += buffered
            ideal = self.first_shown + (self.delivered - 1) * tpot
            self.delay += buffered * (self.last_shown - ideal)
        if late := tokens - buffered:
            first, self.last_shown = now + buffered * every, now + (tokens - 1) * every
            begin = first - self._ideal(self.delivered)
            self.delivered += late
            end = self.last_shown - self._ideal(self.delivered - 1)
            self.delay += late * (begin + end) / 2

    def _ideal(self, index: int) -> float:
        return self.first_shown + index * self.tpot

    def slack(self, now: float) -> float:
        """Seconds until a reader at `pace` misses a token; negative once one is missed or none has
        come."""
        return self.shown + self.pace - now if self.delivered else -self.pace

    def shift(self, seconds: float) -> None:
        """The clock of its times is set forward by so much."""
        if self.delivered:
            self.first_shown += seconds
            self.last_shown += seconds
        if self.early_until >= 0:
            self.early_until += seconds

    @property
    def qoe(self) -> float:
        """`1 - S_delay / S_whole`, in [0, 1].

        `S_delay` sums how late each token was shown; `S_whole` sums how long before the end (one
        `tpot` after the last token was shown) each was due.
        """
        if self.delivered == 0:
            return 1.0
        delivered, last_shown, delay = self._accounted()
        end = last_shown + self.tpot
        due = delivered * (self.first_shown + self._ideal(delivered - 1)) / 2
        whole = delivered * end - due
        return min(1.0, max(0.0, 1.0 - delay / whole))
