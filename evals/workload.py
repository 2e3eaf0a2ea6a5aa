"""What is sent and when: seeded requests of any source at any load.

`python -m evals.workload servegen-r1 --requests 100 --rate 4 --out items.jsonl` writes one. The
same seed gives the same lengths at every rate, and arrivals that only stretch with it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals import sources
from evals.load import turns
from evals.load.items import HASH_BLOCK_TOKENS, Item, load, save
from evals.load.lines import WorkloadError
from evals.sources.draw import Ask, Draw
from evals.sources.presets import PRESETS, Lengths, Preset
from pascal_sglang.sim.loads import arrivals, conversations
from pascal_sglang.sim.workload import PLAIN, Shape, shape_of

__all__ = [
    "PLAIN",
    "PRESETS",
    "Item",
    "Lengths",
    "Preset",
    "Recipe",
    "Shape",
    "WorkloadError",
    "build",
    "generate",
    "load",
    "save",
    "shape_of",
]

ARRIVALS = ("poisson", "gamma", "burst", "trace")
DEFAULT_RATE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a workload.

    requests: how many; a trace that is shorter gives what it has.
    rate: requests per second, by default 1. Not for `trace` arrivals.
    scale: factor on thinking and answer lengths. prompt_scale: on prompt lengths.
    path, lengths, start_s: see `sources.draw.Ask`.
    arrivals: one of `ARRIVALS`; None is the source's own times where it has them, else Poisson.
    cv: coefficient of variation of the gaps of `gamma`.
    burst_on_s, burst_off_s: see `arrivals.burst`.
    speedup: how many times as fast `trace` arrivals come.
    turns: mean turns per conversation; 1 is single requests.
    pause_s: mean time between an answer and the next turn, exponential.
    fits: KV tokens; requests that need more are left out, with the later turns of their
        conversation.
    """

    source: str
    requests: int = 100
    rate: float | None = None
    seed: int = 0
    scale: float = 1.0
    prompt_scale: float = 1.0
    path: Path | None = None
    lengths: str | None = None
    start_s: float = 0.0
    arrivals: str | None = None
    cv: float = 1.0
    burst_on_s: float = 10.0
    burst_off_s: float = 10.0
    speedup: float = 1.0
    turns: float = 1.0
    pause_s: float = 10.0
    fits: int = PLAIN.fits

    def __post_init__(self) -> None:
        positive = (
            "rate",
            "cv",
            "requests",
            "scale",
            "prompt_scale",
            "burst_on_s",
            "speedup",
            "fits",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise WorkloadError(f"{name} must be positive, not {value}")
        least_of = {"seed": 0, "start_s": 0, "burst_off_s": 0, "pause_s": 0, "turns": 1}
        for name, least in least_of.items():
            if not least <= getattr(self, name) < math.inf:
                raise WorkloadError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.arrivals not in (None, *ARRIVALS):
            raise WorkloadError(f"no arrivals {self.arrivals!r}; there are {', '.join(ARRIVALS)}")
        if self.cv != 1 and self.arrivals != "gamma":
            raise WorkloadError("cv is for gamma arrivals")


def build(recipe: Recipe) -> list[Item]:
    """The items of a recipe, the same ones every time; `WorkloadError` where it cannot be had."""
    # A stream of its own for each thing drawn, so that none moves when another draws more.
    lengths, times, extra, talk = (np.random.default_rng([recipe.seed, n]) for n in range(4))
    drawn = sources.draw(
        recipe.source,
        Ask(
            requests=recipe.requests,
            rng=lengths,
            extra_rng=extra,
            scale=recipe.scale,
            prompt_scale=recipe.prompt_scale,
            path=recipe.path,
            lengths=recipe.lengths,
            start_s=recipe.start_s,
        ),
    )
    if recipe.start_s and drawn.times_s is None:
        raise WorkloadError(f"{recipe.source} has no times of its own to start at")
    if recipe.turns == 1:
        begin = _arrivals(recipe, times, drawn.times_s, len(drawn))
        return _fitting(_items(drawn, recipe.seed, begin), recipe)
    if drawn.hash_ids is not None:
        raise WorkloadError(f"{recipe.source} says itself which prompts extend others: no turns")
    counts = conversations.sizes(talk, len(drawn), recipe.turns)
    pauses_s = talk.exponential(recipe.pause_s, len(drawn))
    openings = np.cumsum([0, *counts[:-1]])
    own = None if drawn.times_s is None else drawn.times_s[openings]
    # Fewer arrivals, further apart: the load stays `rate` requests per second.
    begin = _arrivals(recipe, times, own, len(counts), share=len(counts) / len(drawn))
    items = _items(drawn, recipe.seed, np.zeros(len(drawn)))
    return _fitting(turns.converse(items, counts, begin.tolist(), pauses_s.tolist()), recipe)


def _arrivals(
    recipe: Recipe,
    rng: np.random.Generator,
    own_s: np.ndarray | None,
    count: int,
    *,
    share: float = 1.0,
) -> np.ndarray:
    """`count` times at `share` of the recipe's rate; `own_s` are those of the source."""
    kind = recipe.arrivals or ("poisson" if own_s is None else "trace")
    if kind == "trace":
        if own_s is None:
            raise WorkloadError(f"{recipe.source} has no times of its own; give other arrivals")
        if recipe.rate is not None:
            raise WorkloadError(
                "a trace comes at its own rate; use the speed-up, or other arrivals"
            )
        return arrivals.from_trace(own_s, recipe.speedup)
    rate = (recipe.rate or DEFAULT_RATE) * share
    if kind == "burst":
        return arrivals.burst(rng, count, rate, recipe.burst_on_s, recipe.burst_off_s)
    return arrivals.gamma(rng, count, rate, recipe.cv)


def _items(drawn: Draw, seed: int, arrivals_s: np.ndarray) -> list[Item]:
    return [
        Item(
            arrival_s=float(arrivals_s[i]),
            prompt_tokens=int(drawn.prompt[i]),
            thinking_tokens=int(drawn.thinking[i]),
            answer_tokens=int(drawn.answer[i]),
            prompt=drawn.texts[i] if drawn.texts else None,
            draw=None if drawn.texts else (seed, i),
            hash_ids=drawn.hash_ids[i] if drawn.hash_ids else (),
            block_tokens=drawn.block_tokens or HASH_BLOCK_TOKENS,
        )
        for i in range(len(drawn))
    ]


def _fitting(items: Sequence[Item], recipe: Recipe) -> list[Item]:
    """Those that fit, and whose earlier turns do."""
    found: list[Item] = []
    ended: set[int] = set()
    for item in items:
        if item.conversation in ended:
            continue
        if item.prompt_tokens + item.output_tokens <= recipe.fits:
            found.append(item)
        elif item.conversation is not None:
            ended.add(item.conversation)
    if not found:
        raise WorkloadError(f"no request fits into {recipe.fits} tokens")
    return found


def generate(
    preset: str, requests: int, rate: float, seed: int, *, scale: float = 1.0, cv: float = 1.0
) -> list[Item]:
    """Items of a source at `rate` requests per second.

    scale: factor on every thinking and answer length. cv: coefficient of variation of the time
    between arrivals, Gamma-distributed; 1 is Poisson.
    """
    return build(
        Recipe(
            source=preset,
            requests=requests,
            rate=rate,
            seed=seed,
            scale=scale,
            arrivals="gamma",
            cv=cv,
        )
    )


def summary(items: Sequence[Item], origin: str) -> list[str]:
    """Lines that say what a workload is."""
    talks = {item.conversation for item in items if item.conversation is not None}
    last_s = max(item.arrival_s for item in items)
    lines = [
        f"{len(items)} requests in {last_s:.1f} s; {origin}",
        *(
            f"  {label:<16} mean {np.mean(tokens):.0f}, median {np.median(tokens):.0f}, "
            f"p95 {np.percentile(tokens, 95):.0f} tokens"
            for label, tokens in (
                ("prompt", [item.prompt_tokens for item in items]),
                ("thinking", [item.thinking_tokens for item in items]),
                ("answer", [item.answer_tokens for item in items]),
            )
        ),
    ]
    if talks:
        lines.append(f"  {len(talks)} conversations, {len(items) / len(talks):.1f} turns each")
    blocks = [block for item in items for block in item.hash_ids]
    if blocks:
        lines.append(f"  {1 - len(set(blocks)) / len(blocks):.0%} of the prompt blocks came before")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a workload, describe it, write it as JSONL.")
    parser.add_argument("source", help=", ".join(sources.SOURCES))
    parser.add_argument("--path", type=Path, help="file or folder of the source")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, help="requests per second; 1 unless a trace says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on output lengths")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="factor on prompt lengths")
    parser.add_argument("--lengths", help="source of output lengths, for data sets of prompts")
    parser.add_argument(
        "--arrivals", choices=ARRIVALS, help="default: the trace's own times, else poisson"
    )
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps; 1 is Poisson")
    parser.add_argument("--burst-on-s", type=float, default=10.0, help="length of a burst")
    parser.add_argument("--burst-off-s", type=float, default=10.0, help="silence after a burst")
    parser.add_argument("--speedup", type=float, default=1.0, help="of a trace's own times")
    parser.add_argument("--start-s", type=float, default=0.0, help="where in a trace to start")
    parser.add_argument("--turns", type=float, default=1.0, help="mean turns per conversation")
    parser.add_argument("--pause-s", type=float, default=10.0, help="mean time between turns")
    parser.add_argument("--out", type=Path, help="JSONL file")
    asked = vars(parser.parse_args(argv))
    out = asked.pop("out")
    if asked["cv"] != 1 and asked["arrivals"] is None:
        asked["arrivals"] = "gamma"
    try:
        recipe = Recipe(**asked)
        items = build(recipe)
        if out is not None:
            save(items, out)
    except (WorkloadError, OSError) as error:
        print(f"evals: error: {error}", file=sys.stderr)
        return 2
    for line in summary(items, sources.origin(recipe.source, recipe.lengths)):
        print(line)
    if out is not None:
        print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
