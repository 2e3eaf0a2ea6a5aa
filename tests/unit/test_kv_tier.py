"""Which tier is cheapest for paused KV."""

import pytest

from pascal_sglang.policy.kv_tier import Costs, KVTier


def test_a_spent_budget_leaves_only_recompute():
    assert Costs().cheapest(10, host_free_tokens=9) is KVTier.RECOMPUTE
    assert Costs().cheapest(10, host_free_tokens=10) is KVTier.HOST


def test_recompute_only_where_it_is_cheaper_than_both_copies():
    # There and back: 2 * (1 ms + 10 * 0.1 ms) = 4 ms.
    costs = Costs(copy_s=0.001, copy_token_s=0.0001, prefill_token_s=0.0003)
    assert costs.cheapest(10, 100) is KVTier.RECOMPUTE  # 3 ms
    costs.prefill_token_s = 0.0005
    assert costs.cheapest(10, 100) is KVTier.HOST  # 5 ms


def test_prefill_cost_is_learned_and_nonsense_is_not():
    costs = Costs()
    costs.prefilled(0, 1.0)
    costs.prefilled(10, 0.0)
    assert costs.prefill_token_s is None
    costs.prefilled(10, 1.0)
    costs.prefilled(1000, 2.0)
    assert costs.prefill_token_s == pytest.approx(2.9 / 1009)
    costs.prefilled(1, 0.5)
    assert costs.prefill_token_s == pytest.approx((0.9 * 2.9 + 0.5) / (0.9 * 1009 + 1)), "hardly"


def test_a_pause_stalls_for_its_copies_or_for_launching_them():
    """Out and back; beside decode steps the length of the copies does not matter."""
    assert Costs().stall_s(2000) is None, "nothing has been measured"
    waiting = Costs(copy_s=0.001, copy_token_s=1e-5)
    assert waiting.stall_s(2000) == pytest.approx(0.042)
    beside = Costs(copy_s=0.001, copy_token_s=1e-5, launch_s=0.002)
    assert beside.stall_s(10) == beside.stall_s(2000) == pytest.approx(0.004)
