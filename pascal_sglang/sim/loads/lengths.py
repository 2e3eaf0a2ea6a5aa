"""Log-normal lengths with the means of published data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


class Sampled(NamedTuple):
    """Tokens per request; `thinking` is without the end-of-thinking marker."""

    prompt: Whole
    thinking: Whole
    answer: Whole


def scaled(tokens: Floats | Whole, scale: float) -> Whole:
    """Lengths times `scale`, whole and at least one."""
    whole: Whole = np.maximum(1, np.rint(tokens * scale)).astype(np.int64)
    return whole


def split(output: Floats | Whole, reason_ratio: Floats) -> tuple[Whole, Whole]:
    """Thinking and answering tokens of outputs of which a share is reasoning. The end-of-thinking
    marker is the last reasoning token; each side keeps at least one token."""
    reasoning = np.rint(output * reason_ratio).astype(np.int64)
    answer = np.asarray(output - np.maximum(2, reasoning), dtype=np.int64)
    return np.maximum(1, reasoning - 1), np.maximum(1, answer)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal of tokens by its mean before clipping to `low`..`high`."""

    mean: float
    sigma: float
    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int, scale: float) -> Whole:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return scaled(np.clip(rng.lognormal(mu, self.sigma, count), self.low, self.high), scale)


@dataclass(frozen=True, slots=True)
class Preset:
    """Lengths of one data set. `ratio`: thinking tokens per answer token, drawn uniformly per
    request; where it is set the answer follows the thinking and `answer` only clips it."""

    prompt: Lengths
    thinking: Lengths
    answer: Lengths
    ratio: tuple[float, float] | None = None

    def sample(
        self, rng: np.random.Generator, count: int, scale: float = 1.0, prompt_scale: float = 1.0
    ) -> Sampled:
        """scale: factor on output lengths. prompt_scale: on prompt lengths."""
        prompts = self.prompt.sample(rng, count, prompt_scale)
        thinking = self.thinking.sample(rng, count, scale)
        answers = self.answer.sample(rng, count, scale)
        if self.ratio is not None:
            wanted = thinking / rng.uniform(*self.ratio, count)
            answers = scaled(np.minimum(wanted, self.answer.high * scale), 1.0)
        return Sampled(prompts, thinking, answers)


# Means of the first two: token counts of o4-mini as reported in arXiv:2602.11530, with tails to
# about 15,000 tokens. The third spans its 4:1 to 8:1 of MATH-500, GPQA and LiveCodeBench.
PRESETS = {
    "alpacaeval": Preset(
        Lengths(60, 0.6, 8, 512), Lengths(558, 1.0, 16, 15000), Lengths(566, 0.8, 16, 8000)
    ),
    "arena-hard": Preset(
        Lengths(120, 0.8, 8, 2048), Lengths(950, 1.0, 16, 15000), Lengths(824, 0.8, 16, 8000)
    ),
    "reasoning-heavy": Preset(
        Lengths(120, 0.6, 16, 1024),
        Lengths(3000, 0.9, 64, 15000),
        Lengths(500, 0.9, 16, 4000),
        ratio=(4.0, 8.0),
    ),
    # For the tiny model on two cores.
    "tiny-live": Preset(
        Lengths(24, 0.3, 8, 64), Lengths(160, 0.9, 8, 1200), Lengths(120, 0.9, 8, 900)
    ),
}
