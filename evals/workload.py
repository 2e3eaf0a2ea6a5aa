"""What is sent and when: seeded lengths and arrivals, and their files.

`python -m evals.workload tiny-live --requests 100 --rate 4 --out items.jsonl` writes one. The same
seed gives the same lengths at every rate, and arrivals that only stretch with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Item:
    """One request.

    arrival_s: seconds after the run starts.
    thinking_tokens: tokens before the end-of-thinking marker, which is one more.
    answer_tokens: tokens after the marker.
    """

    arrival_s: float
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int

    @property
    def output_tokens(self) -> int:
        return self.thinking_tokens + 1 + self.answer_tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal of tokens by its mean before clipping to `low`..`high`."""

    mean: float
    sigma: float
    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int, scale: float) -> np.ndarray:
        mu = math.log(self.mean) - self.sigma**2 / 2
        drawn = np.clip(rng.lognormal(mu, self.sigma, count), self.low, self.high)
        tokens: np.ndarray = np.maximum(1, np.rint(drawn * scale)).astype(int)
        return tokens


@dataclass(frozen=True, slots=True)
class Preset:
    """Lengths of one data set. `ratio`: thinking tokens per answer token, drawn uniformly per
    request; where it is set the answer follows the thinking and `answer` only clips it."""

    prompt: Lengths
    thinking: Lengths
    answer: Lengths
    ratio: tuple[float, float] | None = None


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


def generate(
    preset: str, requests: int, rate: float, seed: int, *, scale: float = 1.0, cv: float = 1.0
) -> list[Item]:
    """Items of `preset` at `rate` requests per second.

    scale: factor on every thinking and answer length. cv: coefficient of variation of the time
    between arrivals, Gamma-distributed; 1 is Poisson.
    """
    if rate <= 0 or cv <= 0 or requests < 1:
        raise ValueError("rate, cv and requests must be positive")
    shape = PRESETS[preset]
    lengths, times = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    prompts = shape.prompt.sample(lengths, requests, 1.0)
    thinking = shape.thinking.sample(lengths, requests, scale)
    answers = shape.answer.sample(lengths, requests, scale)
    if shape.ratio is not None:
        wanted = thinking / lengths.uniform(*shape.ratio, requests)
        answers = np.maximum(1, np.rint(np.minimum(wanted, shape.answer.high * scale)))
    arrivals = np.cumsum(times.gamma(1 / cv**2, cv**2, requests)) / rate
    return [
        Item(float(at), int(p), int(t), int(a))
        for at, p, t, a in zip(arrivals, prompts, thinking, answers, strict=True)
    ]


def save(items: Sequence[Item], path: Path) -> None:
    """One JSON object a line; floats survive exactly."""
    path.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items))


def load(path: Path) -> list[Item]:
    return [Item(**json.loads(line)) for line in path.read_text().splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a workload as JSONL.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on output lengths")
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps; 1 is Poisson")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    items = generate(
        asked.preset, asked.requests, asked.rate, asked.seed, scale=asked.scale, cv=asked.cv
    )
    save(items, asked.out)
    print(
        f"{len(items)} requests in {items[-1].arrival_s:.1f} s, mean thinking "
        f"{np.mean([i.thinking_tokens for i in items]):.0f}, mean answer "
        f"{np.mean([i.answer_tokens for i in items]):.0f} tokens: {asked.out}"
    )


if __name__ == "__main__":
    main()
