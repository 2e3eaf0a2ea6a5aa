"""The reference platform's functions for recurrent layers: parts that agree with each other.

That they are right is tested against Hugging Face's implementation of a whole model.
"""

import pytest
import torch

from pascal_sglang.platforms import recurrent

HEADS, GROUP, K, V = 2, 2, 8, 4
VALUE_HEADS = HEADS * GROUP


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def prefill(states, tokens, begin, end):
    q, k, v, g, beta = (x[:, begin:end] for x in tokens)
    slots, edges = torch.tensor([1]), torch.tensor([0, end - begin])
    return recurrent.chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=states,
        initial_state_indices=slots,
        cu_seqlens=edges,
        use_qk_l2norm_in_kernel=True,
    )


def tokens(count):
    q, k = torch.randn(2, 1, count, HEADS, K)
    v = torch.randn(1, count, VALUE_HEADS, V)
    g, beta = -torch.rand(1, count, VALUE_HEADS), torch.rand(1, count, VALUE_HEADS)
    return q, k, v, g, beta


def test_a_prefill_in_chunks_is_one_prefill_and_hands_out_the_states_between():
    some, split = tokens(150), 100
    whole, parts = torch.zeros(3, VALUE_HEADS, V, K), torch.zeros(3, VALUE_HEADS, V, K)
    out, _, between = prefill(whole, some, 0, 150)
    first = prefill(parts, some, 0, split)[0]
    second = prefill(parts, some, split, 150)[0]
    torch.testing.assert_close(torch.cat([first, second], 1), out)
    torch.testing.assert_close(parts, whole)
    assert not whole[[0, 2]].any()
    assert between.shape[1] == 3
    for i, begin in enumerate(range(0, 150, recurrent.CHUNK)):
        until = torch.zeros(3, VALUE_HEADS, V, K)
        prefill(until, some, 0, begin)
        torch.testing.assert_close(between[0, i], until[1])


def test_a_decode_step_goes_on_where_a_prefill_ended():
    some = tokens(10)
    states, stepwise = torch.zeros(2, VALUE_HEADS, V, K), torch.zeros(2, VALUE_HEADS, V, K)
    out, _, _ = prefill(states, some, 0, 10)
    prefill(stepwise, some, 0, 9)
    q, k, v, g, beta = (x[0, 9:] for x in some)
    # Gates that come out as those above.
    A_log, dt_bias = torch.zeros(VALUE_HEADS), torch.zeros(VALUE_HEADS)
    a, b = torch.log(torch.expm1(-g)), torch.logit(beta)
    packed = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], -1)
    last = torch.empty(1, 1, VALUE_HEADS, V)
    recurrent.fused_recurrent_gated_delta_rule_packed_decode(
        packed,
        a,
        b,
        A_log,
        dt_bias,
        K**-0.5,
        stepwise,
        last,
        torch.tensor([1]),
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(last[:, 0], out[0, 9:])
    torch.testing.assert_close(stepwise, states)


def test_projections_come_out_alike_however_they_stand():
    """Head by head, and kind by kind."""
    q, k = torch.randn(2, 3, HEADS, K)
    v, z = torch.randn(2, 3, HEADS, GROUP * V)
    b, a = torch.randn(2, 3, HEADS, GROUP)
    sizes = (HEADS, VALUE_HEADS, K, V)
    by_head = recurrent.fused_qkvzba_split_reshape_cat(
        torch.cat([q, k, v, z], -1).flatten(1), torch.cat([b, a], -1).flatten(1), *sizes
    )
    by_kind = recurrent.fused_qkvzba_split_reshape_cat_contiguous(
        torch.cat([x.flatten(1) for x in (q, k, v, z)], -1),
        torch.cat([b.flatten(1), a.flatten(1)], -1),
        *sizes,
    )
    for one, other in zip(by_head, by_kind, strict=True):
        assert torch.equal(one, other)


def test_only_states_that_are_asked_for_are_tracked():
    conv, ssm = torch.rand(2, 6, 3), torch.rand(2, 6, 4, 4)
    before = conv.clone(), ssm.clone()
    recurrent.track_mamba_states_all_layers(
        conv,
        ssm,
        torch.tensor([1, 2, 3]),
        torch.tensor([True, False, True]),
        torch.tensor([4, 5, -1]),
        3,
    )
    for now, was in zip((conv, ssm), before, strict=True):
        assert torch.equal(now[:, 4], was[:, 1])
        assert torch.equal(now[:, [0, 1, 2, 3, 5]], was[:, [0, 1, 2, 3, 5]])
