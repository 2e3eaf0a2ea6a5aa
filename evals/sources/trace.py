"""What traces of requests have in common: rows of time, prompt and output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evals.load.lines import WorkloadError
from evals.sources import servegen
from evals.sources.draw import Ask, Draw
from pascal_sglang.sim.loads.lengths import scaled, split


class Row(NamedTuple):
    """at_s: seconds on the trace's own clock."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def draw_trace(
    ask: Ask,
    rows: Iterator[tuple[Row, tuple[int, ...]]],
    *,
    block_tokens: int | None = None,
) -> Draw:
    """The `ask.requests` rows from `ask.start_s` after the first row on, or as many as there are.

    Traces are about in order of time; the rows are read as they come, so that a trace of any size
    will do, and only the kept ones are sorted. The second of each pair is its `hash_ids`.
    """
    first = next(rows, None)
    if first is None:
        raise WorkloadError(f"{ask.path}: no requests in it")
    begin_s = first[0].at_s + ask.start_s
    later = (pair for pair in itertools.chain([first], rows) if pair[0].at_s >= begin_s)
    kept = sorted(itertools.islice(later, ask.requests), key=lambda pair: pair[0].at_s)
    if not kept:
        raise WorkloadError(f"{ask.path}: nothing in it from {ask.start_s:g} s on")
    times_s, prompt, output = (
        np.array(column) for column in zip(*(r for r, _ in kept), strict=True)
    )
    share = servegen.thinking_share(ask.extra_rng, len(kept))
    thinking, answer = split(scaled(output, ask.scale), share)
    return Draw(
        scaled(prompt, ask.prompt_scale),
        thinking,
        answer,
        times_s,
        hash_ids=tuple(ids for _, ids in kept) if block_tokens else None,
        block_tokens=block_tokens,
    )
