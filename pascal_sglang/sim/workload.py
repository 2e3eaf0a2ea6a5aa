"""What arrives and when, as columns; read from the files of `evals.workload` or drawn here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pascal_sglang.sim.loads import arrivals, conversations, servegen
from pascal_sglang.sim.loads.lengths import PRESETS, Floats, Sampled

SERVEGEN = "servegen-r1"
SOURCES = (*PRESETS, SERVEGEN)


@dataclass(frozen=True, slots=True)
class Workload:
    """One entry per request in every column.

    arrival_s: seconds; of a later turn unused. prompt, thinking, answer: tokens, `thinking` without
        the end-of-thinking marker. history: leading prompt tokens that the conversation's last
        prompt had too. follows: the turn that `pause_s` after a request's end comes next, or -1;
        `later` holds every request that comes that way. program: a program reads the answer, which
        no pace holds; interactive: of the higher of two priorities; tenant: whose the request is.
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
    program: list[bool] = field(default_factory=list)
    interactive: list[bool] = field(default_factory=list)
    tenant: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def output_tokens(self) -> int:
        """Tokens all requests generate, the markers included."""
        return sum(self.thinking) + sum(self.answer) + len(self)

    def output(self, index: int) -> int:
        return self.thinking[index] + 1 + self.answer[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a drawn workload is like, beside its lengths and its rate.

    cv: coefficient of variation of the time between arrivals, Gamma-distributed; 1 is Poisson.
    burst_s: seconds with arrivals and seconds without, over and over. turns: mean turns per
    conversation; pause_s: mean seconds between an answer and the next turn. programs: share of
    answers that programs read. interactive: share of requests of the higher priority. tenants: how
    many requests each sends, as a multiple of any one. fits: KV tokens; requests that need more are
    left out, with the later turns of their conversation.
    """

    cv: float = 1.0
    burst_s: tuple[float, float] | None = None
    turns: float = 1.0
    pause_s: float = 10.0
    programs: float = 0.0
    interactive: float = 0.0
    tenants: tuple[float, ...] = ()
    fits: int = 1 << 60


PLAIN = Shape()


def shape_of(told: Mapping[str, Any]) -> Shape:
    """A `[shape]` table, or JSON. Raises TypeError or ValueError for what is none."""
    values = dict(told)
    if values.get("burst_s") is not None:
        on_s, off_s = values["burst_s"]
        values["burst_s"] = float(on_s), float(off_s)
    return Shape(**values)


def draw(source: str, requests: int, rate: float, seed: int, shape: Shape = PLAIN) -> Workload:
    """`requests` of one of `SOURCES` at `rate` per second: the same as `evals.workload.build`."""
    lengths, times, talk, readers, priorities, whose = (
        np.random.default_rng([seed, stream]) for stream in (0, 1, 3, 4, 5, 6)
    )
    sampled = _sample(source, lengths, requests)
    turns, pauses_s = [1] * requests, [0.0] * requests
    if shape.turns > 1:
        turns = conversations.sizes(talk, requests, shape.turns)
        pauses_s = talk.exponential(shape.pause_s, requests).tolist()
    # Fewer arrivals, further apart: the load stays `rate` requests per second.
    times_s = _arrivals(times, len(turns), rate * len(turns) / requests, shape)
    rows, nexts = [], iter(zip(*(part.tolist() for part in sampled), pauses_s, strict=True))
    for conversation, (count, begin_s) in enumerate(zip(turns, times_s.tolist(), strict=True)):
        history, fits = 0, True
        for prompt, thinking, answer, pause_s in itertools.islice(nexts, count):
            fits = fits and history + prompt + thinking + 1 + answer <= shape.fits
            if fits:
                rows.append(
                    {
                        "arrival_s": begin_s,
                        "prompt_tokens": history + prompt,
                        "thinking_tokens": thinking,
                        "answer_tokens": answer,
                        "conversation": conversation if shape.turns > 1 else None,
                        "pause_s": pause_s if history else 0.0,
                    }
                )
            history += prompt + answer
    drawn = from_rows(rows)
    return dataclasses.replace(
        drawn,
        program=(readers.random(len(drawn)) < shape.programs).tolist(),
        interactive=(priorities.random(len(drawn)) < shape.interactive).tolist(),
        tenant=_tenants(whose, len(drawn), shape.tenants),
    )


def _tenants(rng: np.random.Generator, count: int, weights: Sequence[float]) -> list[int]:
    if not weights:
        return []
    shares = np.array(weights) / sum(weights)
    tenants: list[int] = rng.choice(len(weights), count, p=shares).tolist()
    return tenants


def _arrivals(rng: np.random.Generator, count: int, rate: float, shape: Shape) -> Floats:
    if shape.burst_s is not None:
        return arrivals.burst(rng, count, rate, *shape.burst_s)
    return arrivals.gamma(rng, count, rate, shape.cv)


class Means(NamedTuple):
    """Mean tokens of a source: prompts, outputs, and the KV of a request while it runs, which
    counts long ones for as long as they are there."""

    prompt: float
    output: float
    held: float


@functools.cache
def mean_lengths(source: str, fits: int = PLAIN.fits, samples: int = 100_000) -> Means:
    """Of the requests that need no more than `fits` KV tokens."""
    found = _sample(source, np.random.default_rng(0), samples)
    output = found.thinking + found.answer + 1.0
    left = found.prompt + output <= fits
    prompt, output = found.prompt[left], output[left]
    held = (output * (prompt + output / 2)).sum() / output.sum()
    return Means(float(prompt.mean()), float(output.mean()), float(held))


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
