"""What arrives and when, as columns; read from the files of `evals.workload` or drawn here."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pascal_sglang.sim.loads import arrivals, servegen
from pascal_sglang.sim.loads.lengths import PRESETS, Sampled

SERVEGEN = "servegen-r1"
SOURCES = (*PRESETS, SERVEGEN)


@dataclass(frozen=True, slots=True)
class Workload:
    """One entry per request in every column.

    arrival_s: seconds; of a later turn unused. prompt, thinking, answer: tokens, `thinking` without
        the end-of-thinking marker. history: leading prompt tokens that the conversation's last
        prompt had too. follows: the turn that `pause_s` after a request's end comes next, or -1;
        `later` holds every request that comes that way.
    """

    arrival_s: list[float]
    prompt: list[int]
    thinking: list[int]
    answer: list[int]
    talk: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    later: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def output_tokens(self) -> int:
        """Tokens all requests generate, the markers included."""
        return sum(self.thinking) + sum(self.answer) + len(self)

    def output(self, index: int) -> int:
        return self.thinking[index] + 1 + self.answer[index]


def draw(source: str, requests: int, rate: float, seed: int, cv: float = 1.0) -> Workload:
    """`requests` of one of `SOURCES` at `rate` per second: the same as `evals.workload.generate`.

    cv: coefficient of variation of the time between arrivals, Gamma-distributed; 1 is Poisson.
    """
    lengths, times = (np.random.default_rng([seed, stream]) for stream in range(2))
    sampled = _sample(source, lengths, requests)
    times_s = arrivals.gamma(times, requests, rate, cv)
    return Workload(
        times_s.tolist(),
        sampled.prompt.tolist(),
        sampled.thinking.tolist(),
        sampled.answer.tolist(),
    )


class Means(NamedTuple):
    """Mean tokens of a source: prompts, outputs, and the KV of a request while it runs, which
    counts long ones for as long as they are there."""

    prompt: float
    output: float
    held: float


@functools.cache
def mean_lengths(source: str, samples: int = 100_000) -> Means:
    found = _sample(source, np.random.default_rng(0), samples)
    output = found.thinking + found.answer + 1.0
    held = (output * (found.prompt + output / 2)).sum() / output.sum()
    return Means(float(found.prompt.mean()), float(output.mean()), float(held))


def _sample(source: str, rng: np.random.Generator, requests: int) -> Sampled:
    if source == SERVEGEN:
        return servegen.sample(rng, requests)
    if source not in PRESETS:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    return PRESETS[source].sample(rng, requests)


def read(path: Path) -> Workload:
    """A JSONL file of `evals.workload --out`. Raises OSError, or ValueError with file and line."""
    rows: list[dict[str, Any]] = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(line, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: no requests in it")
    return from_rows(rows)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        tokens = [row[name] for name in ("prompt_tokens", "answer_tokens")]
        whole = all(type(each) is int and each > 0 for each in tokens)
        thinking, at = row["thinking_tokens"], row["arrival_s"]
        if not whole or type(thinking) is not int or thinking < 0 or not float(at) >= 0:
            raise ValueError("bad lengths or times")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a request: {error}") from error
    found: dict[str, Any] = row
    return found


def from_rows(rows: Sequence[dict[str, Any]]) -> Workload:
    """Requests as `evals.load.items.Item` names their fields."""
    follows, later, last = [-1] * len(rows), set(), dict[int, int]()
    history, talk = [0] * len(rows), [-1] * len(rows)
    for index, row in enumerate(rows):
        conversation = row.get("conversation")
        if conversation is None:
            continue
        talk[index] = int(conversation)
        before = last.get(conversation)
        last[conversation] = index
        if before is not None:
            follows[before] = index
            later.add(index)
            history[index] = int(rows[before]["prompt_tokens"])
    return Workload(
        [float(row["arrival_s"]) for row in rows],
        [int(row["prompt_tokens"]) for row in rows],
        [int(row["thinking_tokens"]) for row in rows],
        [int(row["answer_tokens"]) for row in rows],
        talk,
        history,
        follows,
        [float(row.get("pause_s", 0.0)) for row in rows],
        frozenset(later),
    )
