"""What things take: decode steps, prefills, copies, moves. All in seconds and tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Coefficients of one instance, measured (`calibrate`) or derived (`hardware`).

    step_s, request_s, kv_token_s: a decode step takes `step_s`, and so much per running request
        and per KV token that attention reads.
    prefill_s, prefill_token_s: a prefill pass, and each of its tokens.
    copy_s, copy_token_s: one copy between device and host, and each of its tokens.
    copies_beside: copies run beside the decoding, one after the other, as on CUDA; otherwise the
        engine waits for each of them, as on a CPU.
    copy_launch_s: seconds for which the engine waits all the same to launch such a copy.
    migration_s, migration_token_s: one message between instances, and each KV token that moves.
    capacity: KV tokens on the device. host: KV tokens of paused requests in host memory.
    slots: requests that run at once. chunk: tokens of one prefill pass.
    """

    step_s: float
    request_s: float
    kv_token_s: float
    prefill_s: float
    prefill_token_s: float
    copy_s: float = 0.0
    copy_token_s: float = 0.0
    copies_beside: bool = False
    copy_launch_s: float = 0.0
    migration_s: float = 0.0
    migration_token_s: float = 0.0
    capacity: int
    host: int
    slots: int = 256
    chunk: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name} must be a number of at least 0, not {value}")
        if self.step_s + self.request_s <= 0 or min(self.capacity, self.slots, self.chunk) < 1:
            raise ValueError("a step takes time, and an instance has memory, slots and a chunk")

    def decode(self, requests: int, kv_tokens: int) -> float:
        """Seconds of one decode step."""
        return self.step_s + self.request_s * requests + self.kv_token_s * kv_tokens

    def prefill(self, tokens: int) -> float:
        """Seconds of one prefill pass."""
        return self.prefill_s + self.prefill_token_s * tokens

    def copy(self, tokens: int) -> float:
        """Seconds of one copy between device and host."""
        return self.copy_s + self.copy_token_s * tokens

    def rate(self, prompt: float, output: float, held: float) -> float:
        """Requests per second that one instance can end for ever with its memory always full.

        prompt, output: mean tokens of a request. held: mean KV tokens of those who run.
        """
        running = min(self.slots, self.capacity / held)
        step = self.step_s + self.request_s * running + self.kv_token_s * running * held
        return 1 / (output * step / running + self.prefill_s + self.prefill_token_s * prompt)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: Path) -> Cost:
    """What `Cost.save` wrote. Raises OSError, or ValueError with one line for a bad file."""
    try:
        values = json.loads(path.read_text())
        return Cost(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a cost file: {error}") from error
