"""Arrivals, the registry of sources, and what sources share."""

from types import SimpleNamespace

import numpy as np
import pytest

from evals.load.lines import WorkloadError
from evals.workload import Recipe, build
from pascal_sglang.sim.loads.arrivals import burst, from_trace
from pascal_sglang.sim.loads.lengths import split


def test_an_unknown_source_names_the_known_ones():
    with pytest.raises(WorkloadError, match=r"no source 'nope'; .*alpacaeval.*servegen-r1.*mbpp"):
        build(Recipe(source="nope"))


def test_split_keeps_the_whole():
    thinking, answer = split(np.array([100, 100, 100, 3, 1]), np.array([0.76, 0.0, 1.0, 0.5, 0.5]))
    # 76 reasoning tokens are 75 and the marker; each side keeps one where there is room.
    assert thinking.tolist() == [75, 1, 99, 1, 1]
    assert answer.tolist() == [24, 98, 1, 1, 1]


def test_bursts_are_dense_and_then_silent():
    even = SimpleNamespace(gamma=lambda shape, scale, count: np.ones(count))
    # 1/s over 2 s on and 3 s off is 2.5/s while on: every 0.4 s of busy time.
    times = burst(even, 7, rate=1.0, on_s=2.0, off_s=3.0)
    assert times == pytest.approx([0.4, 0.8, 1.2, 1.6, 5.0, 5.4, 5.8])
    many = burst(np.random.default_rng(0), 20_000, rate=1.0, on_s=2.0, off_s=3.0)
    assert (many % 5.0).max() < 2.0
    assert len(many) / many[-1] == pytest.approx(1.0, rel=0.05)


def test_a_trace_starts_at_once_and_runs_faster():
    assert from_trace(np.array([7.0, 8.0, 11.0]), 2.0).tolist() == [0.0, 0.5, 2.0]
