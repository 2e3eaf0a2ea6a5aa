"""The tiers that paused KV can be in, and what each costs on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

# KV of a request that is paused, in quanta, where one figure has to stand for all of them.
TYPICAL_QUANTA = 4


class KVTier(Enum):
    """Where a paused request's KV is, cheapest first."""

    RESIDENT = "resident"  # on the device; only the request slot is given back
    HOST = "host"  # in host memory; comes back by a copy
    RECOMPUTE = "recompute"  # nowhere; prompt and output so far are prefilled again


@dataclass(slots=True)
class Costs:
    """What moving and recomputing KV takes here, in seconds; measured, never assumed.

    copy_s, copy_token_s: one copy between device and host, and each of its tokens.
    prefill_token_s: each token of a prefill; None until one has been seen.
    launch_s: what launching a copy takes where decode steps go on beside it; None where they wait
        for the copy.
    prefill_s: all prefills so far.
    """

    copy_s: float = 0.0
    copy_token_s: float = 0.0
    prefill_token_s: float | None = None
    launch_s: float | None = None
    prefill_s: float = 0.0
    _tokens: float = field(default=0.0, repr=False)
    _seconds: float = field(default=0.0, repr=False)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Learn from a prefill of `tokens` that took `seconds`. Recent ones count more, and long
        ones more than short ones, whose time is mostly that of any step."""
        if tokens <= 0 or seconds <= 0:
            return
        self.prefill_s += seconds
        self._tokens = 0.9 * self._tokens + tokens
        self._seconds = 0.9 * self._seconds + seconds
        self.prefill_token_s = self._seconds / self._tokens

    def stall_s(self, tokens: int) -> float | None:
        """Seconds that decode steps stand still for a pause of `tokens` of KV and its return; None
        where copies have not been measured."""
        if self.launch_s is not None:
            return 2 * self.launch_s
        if not (self.copy_s or self.copy_token_s):
            return None
        return 2 * (self.copy_s + tokens * self.copy_token_s)

    def copy_pays(self, tokens: int) -> bool:
        """Whether bringing `tokens` back by a copy takes less than prefilling them again."""
        if self.prefill_token_s is None:
            return True
        return self.copy_s + tokens * self.copy_token_s < tokens * self.prefill_token_s

    def describe(self) -> dict[str, float | None]:
        """The figures by name, in seconds."""
        return {
            "copy_s": self.copy_s,
            "copy_token_s": self.copy_token_s,
            "launch_s": self.launch_s,
            "prefill_token_s": self.prefill_token_s,
        }

    def cheapest(self, tokens: int, host_free_tokens: int) -> KVTier:
        """The tier for KV that has to leave the device: `host` while the budget lasts, unless
        prefilling it again takes less than carrying it there and back."""
        if tokens > host_free_tokens:
            return KVTier.RECOMPUTE
        if self.prefill_token_s is None:
            return KVTier.HOST
        carried = 2 * (self.copy_s + tokens * self.copy_token_s)
        return KVTier.RECOMPUTE if tokens * self.prefill_token_s < carried else KVTier.HOST
