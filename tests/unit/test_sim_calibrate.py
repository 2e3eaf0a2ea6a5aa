"""Costs are found again in what clients saw of a server with known costs."""

import numpy as np
import pytest

from pascal_sglang.sim.cost import Cost, load
from pascal_sglang.sim.experiments.calibrate import Stream, fit
from pascal_sglang.sim.hardware import PRESETS, preset

KNOWN = Cost(
    step_s=4e-3, request_s=2e-4, kv_token_s=1e-7, prefill_s=3e-3, prefill_token_s=5e-5,
    capacity=10**6, host=0,
)  # fmt: skip


def streams(noise_s=0.0, longest=64):
    """A server that runs everybody at once, one step or prefill after the other."""
    dice = np.random.default_rng(0)
    due = np.cumsum(dice.exponential(0.2, 150)).tolist()
    now, running, found = 0.0, [], []
    while due or running:
        fresh = []
        while due and due[0] <= now:
            due.pop(0)
            fresh.append((int(dice.integers(8, longest)), [], int(dice.integers(20, 200))))
        if fresh:
            now += KNOWN.prefill(sum(prompt for prompt, _, _ in fresh))
            for _, seen, _ in fresh:
                seen.append(now)
            running += fresh
        elif not running:
            now = due[0]
            continue
        now += KNOWN.decode(len(running), sum(p + len(seen) for p, seen, _ in running))
        for _, seen, _ in running:
            seen.append(now + noise_s * dice.random())
        found += [Stream(p, seen) for p, seen, n in running if len(seen) >= n]
        running = [each for each in running if len(each[1]) < each[2]]
    return found


def test_known_costs_are_found_again():
    found = fit(streams())
    assert found.step_s == pytest.approx(KNOWN.step_s, rel=0.02)
    assert found.request_s == pytest.approx(KNOWN.request_s, rel=0.02)
    assert found.kv_token_s == pytest.approx(KNOWN.kv_token_s, rel=0.1)
    assert found.prefill_s == pytest.approx(KNOWN.prefill_s, rel=0.1)
    assert found.error < 0.01


@pytest.mark.parametrize("noise_s", [0.0, 2e-3])
def test_a_long_prefill_is_no_pause(noise_s):
    """Up to a hundred milliseconds, in which nobody gets a token."""
    found = fit(streams(noise_s, longest=2000))
    assert found.prefill_token_s == pytest.approx(KNOWN.prefill_token_s, rel=0.03)
    assert found.step_s + 10 * found.request_s == pytest.approx(6e-3, rel=0.05)


def test_late_clients_blur_but_do_not_shift_it():
    found = fit(streams(noise_s=2e-3))
    assert found.step_s + 10 * found.request_s == pytest.approx(6e-3, rel=0.05)
    assert 0.01 < found.error < 0.3


def test_too_little_is_said():
    with pytest.raises(ValueError, match="only 1 gaps"):
        fit([Stream(8, [0.0, 1.0])])


def test_costs_survive_a_file(tmp_path):
    for cost in (KNOWN, *PRESETS.values()):
        cost.save(tmp_path / "cost.json")
        assert load(tmp_path / "cost.json") == cost


def test_kv_reads_reach_the_share_of_the_bandwidth_that_is_given():
    usual, less = (preset("r1-qwen-32b-h100", share) for share in (None, 0.4))
    assert less.kv_token_s == pytest.approx(2 * usual.kv_token_s)
    assert less.step_s == usual.step_s
    assert preset("r1-qwen-32b-h100-80").capacity == pytest.approx(16.8e3, rel=0.01)
