"""When requests arrive: seconds after the start, in order, for a seeded generator."""

from __future__ import annotations

import numpy as np


def gamma(rng: np.random.Generator, count: int, rate: float, cv: float = 1.0) -> np.ndarray:
    """Gaps that are Gamma-distributed with mean `1 / rate` seconds and coefficient of variation
    `cv`; 1 is Poisson."""
    times: np.ndarray = np.cumsum(rng.gamma(1 / cv**2, cv**2, count)) / rate
    return times


def burst(
    rng: np.random.Generator, count: int, rate: float, on_s: float, off_s: float
) -> np.ndarray:
    """Poisson for `on_s` seconds, nothing for `off_s`, over and over; `rate` is the mean over both,
    so the bursts are `(on_s + off_s) / on_s` times as dense."""
    busy_s = gamma(rng, count, rate * (on_s + off_s) / on_s)
    times: np.ndarray = busy_s + np.floor(busy_s / on_s) * off_s
    return times


def from_trace(times_s: np.ndarray, speedup: float) -> np.ndarray:
    """A trace's own times, from its first request on, `speedup` times as fast."""
    times: np.ndarray = (times_s - times_s[0]) / speedup
    return times
