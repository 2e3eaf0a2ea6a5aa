"""Costs fitted to a measured run, from nothing but when each client saw its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pascal_sglang.sim.loads.lengths import Floats

# A gap this many times its stream's median is a pause if somebody else got a token meanwhile. If
# nobody did, the engine was busy with a long prompt.
PAUSE_FACTOR = 6.0
# Tokens of one step reach different clients within this many seconds.
SAME_STEP_S = 1e-4


@dataclass(frozen=True, slots=True)
class Stream:
    """What one client saw: prompt tokens, and when each output token came (s, ascending)."""

    prompt: int
    token_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients as in `Cost`, of decode steps and of prefills between them.

    error: mean of what is left unexplained, relative to the mean gap. gaps: how many were used.
    """

    step_s: float
    request_s: float
    kv_token_s: float
    prefill_s: float
    prefill_token_s: float
    error: float
    gaps: int


def fit(streams: Sequence[Stream]) -> Fit:
    """Least squares over the gaps between tokens of one stream: a step for whoever runs then, and
    the prefills of those whose first token falls into the gap. Negative coefficients are left out.

    Raises ValueError where there is too little to fit.
    """
    rows, gaps, weights = _samples([s for s in streams if len(s.token_s) > 1])
    if len(gaps) < 100:
        raise ValueError(f"only {len(gaps)} gaps between tokens to fit costs to")
    kept = list(range(rows.shape[1]))
    root = np.sqrt(weights)
    while True:
        found = np.linalg.lstsq(rows[:, kept] * root[:, None], gaps * root, rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    whole = np.zeros(rows.shape[1])
    whole[kept] = found
    left = np.abs(rows @ whole - gaps)
    error = float((left * weights).sum() / (gaps * weights).sum())
    step, request, kv, prefill, token = (float(value) for value in whole)
    return Fit(step, request, kv, prefill, token, error, len(gaps))


def _samples(streams: Sequence[Stream]) -> tuple[Floats, Floats, Floats]:
    """Per gap: its regressors (1, running, KV tokens, prefills, their tokens), its length, and a
    weight that counts every step once."""
    begins, ends, lengths = [], [], []
    idle: list[tuple[float, float]] = []
    # By when a decode step had ended.
    decoded = np.sort(np.concatenate([s.token_s[1:] for s in streams]))
    for stream in streams:
        at = np.asarray(stream.token_s, dtype=float)
        gap = np.diff(at)
        steps = gap > SAME_STEP_S
        usual = np.median(gap[steps]) if steps.any() else 0.0
        after = np.searchsorted(decoded, at[:-1] + usual / 2)
        pauses = (gap > PAUSE_FACTOR * usual) & (
            np.searchsorted(decoded, at[1:] - usual / 2) > after
        )
        idle += zip(at[:-1][pauses].tolist(), at[1:][pauses].tolist(), strict=True)
        use = steps & ~pauses
        begins.append(at[:-1][use])
        ends.append(at[1:][use])
        lengths.append(gap[use])
    begin, end, gap = (np.concatenate(part) for part in (begins, ends, lengths))
    middle = (begin + end) / 2
    first = np.sort([s.token_s[0] for s in streams])
    order = np.argsort([s.token_s[0] for s in streams])
    prompts = np.concatenate([[0], np.cumsum(np.array([s.prompt for s in streams])[order])])
    running = _inside(middle, [(s.token_s[0], s.token_s[-1]) for s in streams])
    running = np.maximum(1, running - _inside(middle, idle))
    held = _held(streams, middle)
    low, high = np.searchsorted(first, begin, "right"), np.searchsorted(first, end, "right")
    prefills = high > low
    tokens = prompts[high] - prompts[low]
    rows = np.stack([np.ones_like(gap), running, held, prefills, tokens], axis=1).astype(float)
    return rows, gap, 1 / running


def _inside(at: Floats, spans: Sequence[tuple[float, float]]) -> Floats:
    """How many of the spans contain each moment."""
    begins = np.sort([begin for begin, _ in spans])
    ends = np.sort([end for _, end in spans])
    found: Floats = (np.searchsorted(begins, at) - np.searchsorted(ends, at)).astype(float)
    return found


def _held(streams: Sequence[Stream], at: Floats) -> Floats:
    """KV tokens of everybody between first and last token."""
    tokens = np.sort(np.concatenate([np.asarray(s.token_s) for s in streams]))
    firsts = sorted((s.token_s[0], s.prompt) for s in streams)
    lasts = sorted((s.token_s[-1], s.prompt + len(s.token_s)) for s in streams)
    came = np.concatenate([[0], np.cumsum([prompt for _, prompt in firsts])])
    went = np.concatenate([[0], np.cumsum([held for _, held in lasts])])
    generated = np.searchsorted(tokens, at)
    begun = came[np.searchsorted([when for when, _ in firsts], at)]
    ended = went[np.searchsorted([when for when, _ in lasts], at)]
    found: Floats = np.maximum(0, generated + begun - ended).astype(float)
    return found
