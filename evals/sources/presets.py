"""Log-normal lengths with the means of published data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evals.sources.draw import Ask, Draw, scaled


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal of tokens by its mean before clipping to `low`..`high`."""

    mean: float
    sigma: float
    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int, scale: float) -> np.ndarray:
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

    def draw(self, ask: Ask) -> Draw:
        prompts = self.prompt.sample(ask.rng, ask.requests, ask.prompt_scale)
        thinking = self.thinking.sample(ask.rng, ask.requests, ask.scale)
        answers = self.answer.sample(ask.rng, ask.requests, ask.scale)
        if self.ratio is not None:
            wanted = thinking / ask.rng.uniform(*self.ratio, ask.requests)
            answers = scaled(np.minimum(wanted, self.answer.high * ask.scale), 1.0)
        return Draw(prompts, thinking, answers)


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
