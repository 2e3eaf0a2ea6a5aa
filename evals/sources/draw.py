"""What a source is asked for and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a source is asked for.

    rng: for lengths. extra_rng: for whatever else is drawn.
    scale, prompt_scale: factors on output and on prompt lengths.
    path: the file or folder to read; None is the source's own data, where it has some.
    lengths: for a source of prompts only: the source its output lengths come from.
    start_s: where in a trace to start, seconds after its beginning.
    """

    requests: int
    rng: np.random.Generator
    extra_rng: np.random.Generator
    scale: float = 1.0
    prompt_scale: float = 1.0
    path: Path | None = None
    lengths: str | None = None
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Draw:
    """Requests in order; all that is there is equally long.

    prompt, thinking, answer: tokens. times_s: the source's own arrival times in seconds.
    texts: prompts as text. hash_ids: see `Item`, in blocks of `block_tokens`.
    """

    prompt: np.ndarray
    thinking: np.ndarray
    answer: np.ndarray
    times_s: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    hash_ids: tuple[tuple[int, ...], ...] | None = None
    block_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.prompt)
