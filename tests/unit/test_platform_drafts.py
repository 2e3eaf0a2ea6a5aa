"""What the reference platform does in the place of kernels, against what those are for."""

import pytest
import torch

from pascal_sglang.platforms import speculative

LENGTHS = torch.tensor([3, 5])
NEW = 4


def chain(lengths=LENGTHS, **changes):
    bs = len(lengths)
    made = {
        "parent_list": None,
        "top_scores_index": None,
        "seq_lens": lengths,
        "tree_mask": torch.ones(NEW * int((lengths + NEW).sum()), dtype=torch.bool),
        "positions": torch.empty(bs * NEW, dtype=torch.int64),
        "retrieve_index": torch.full((bs, NEW), -1),
        "retrieve_next_token": torch.full((bs, NEW), -1),
        "retrieve_next_sibling": torch.full((bs, NEW), -1),
        "topk": 1,
        "spec_steps": NEW - 1,
        "num_verify_tokens": NEW,
        "tree_mask_mode": 0,
        **changes,
    }
    speculative.build_chain(**made)
    return made


def test_a_chain_sees_the_kv_and_what_comes_before():
    made = chain()
    assert made["positions"].tolist() == [3, 4, 5, 6, 5, 6, 7, 8]
    assert made["retrieve_index"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made["retrieve_next_token"].tolist() == [[1, 2, 3, -1]] * 2
    assert made["retrieve_next_sibling"].tolist() == [[-1] * NEW] * 2
    begin = 0
    for length in LENGTHS.tolist():
        whole = length + NEW
        mask = made["tree_mask"][begin : begin + NEW * whole].view(NEW, whole)
        assert torch.equal(mask, torch.ones(NEW, whole, dtype=torch.bool).tril(length))
        begin += NEW * whole


def test_a_tree_is_refused():
    with pytest.raises(NotImplementedError, match="eagle-topk"):
        chain(topk=2)


@pytest.mark.parametrize(
    ("draft", "target", "correct"),
    [
        ([5, 1, 2, 3], [1, 2, 3, 9], 3),
        ([5, 1, 2, 3], [1, 7, 3, 9], 1),
        ([5, 1, 2, 3], [8, 2, 3, 9], 0),
    ],
)
def test_greedy_verification_takes_what_the_target_writes(draft, target, correct):
    made = chain(torch.tensor([6]))
    predicts, accepted, counts = speculative.verify_greedy(
        torch.zeros(NEW, dtype=torch.int32),
        torch.full((1, NEW), -1, dtype=torch.int32),
        torch.empty(1, dtype=torch.int32),
        torch.tensor([draft]),
        made["retrieve_index"],
        made["retrieve_next_token"],
        made["retrieve_next_sibling"],
        torch.tensor([target]),
    )
    assert counts.tolist() == [correct]
    assert accepted.tolist() == [[*range(correct + 1), *[-1] * (NEW - correct - 1)]]
    assert predicts[: correct + 1].tolist() == target[: correct + 1]


def test_sampled_verification_gives_the_target_models_tokens():
    """The first token of a step has the target model's probabilities, whatever is proposed."""
    torch.manual_seed(0)
    draws, vocabulary = 20000, 5
    first = torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05])
    probs = torch.stack([first, torch.full((vocabulary,), 0.2)]).expand(draws, 2, vocabulary)
    predicts = torch.zeros(2 * draws, dtype=torch.int32)
    accepted = torch.full((draws, 2), -1, dtype=torch.int32)
    counts = torch.empty(draws, dtype=torch.int32)
    speculative.verify_sampled(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=counts,
        candidates=torch.tensor([[0, 3]]).expand(draws, 2),
        retrive_index=torch.arange(2 * draws).view(draws, 2),
        retrive_next_token=None,
        retrive_next_sibling=None,
        uniform_samples=torch.rand(draws, 2),
        uniform_samples_for_final_sampling=torch.rand(draws),
        target_probs=probs,
        draft_probs=None,
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
    )
    found = torch.bincount(predicts.view(draws, 2)[:, 0], minlength=vocabulary) / draws
    torch.testing.assert_close(found, first, atol=0.015, rtol=0)
    assert counts.float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert (accepted[:, 1] >= 0).tolist() == (counts == 1).tolist()


def test_rows_are_written_and_read_back():
    rows = torch.zeros(3, 10, dtype=torch.int32)
    which = torch.tensor([2, 0])
    start, end = torch.tensor([1, 4]), torch.tensor([3, 5])
    speculative.write_rows(which, rows, start, end, torch.tensor([7, 8, 9]), 2)
    assert rows[2].tolist() == [0, 7, 8, *[0] * 7]
    assert rows[0].tolist() == [*[0] * 4, 9, *[0] * 5]
    found = speculative.read_rows(
        req_pool_indices=which,
        req_to_token=rows,
        start_offset=start,
        end_offset=end,
        batch_size=2,
        draft_token_num=0,
        device="cpu",
    )
    assert found.tolist() == [7, 8, 9]
    out = torch.empty(4, dtype=torch.int64)
    speculative.draft_locations(which, rows, torch.tensor([1, 3]), out, 1, 2)
    assert out.tolist() == [7, 8, 0, 9]


def test_the_last_accepted_token_goes_on():
    found = torch.empty(2, dtype=torch.int32)
    tokens = torch.tensor([[4, 5, 6], [7, 8, 9]])
    speculative.last_accepted(tokens, torch.tensor([1, 3]), found, 3, 2)
    assert found.tolist() == [4, 9]


def test_renormalized_probabilities():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    k = speculative.renormalized_top_k(probs, torch.tensor([2, 1], dtype=torch.int32))
    torch.testing.assert_close(k, torch.tensor([[0.625, 0.375, 0.0], [0.0, 0.0, 1.0]]))
    p = speculative.renormalized_top_p(probs, torch.tensor([0.6, 1.0]))
    torch.testing.assert_close(p, torch.tensor([[0.625, 0.375, 0.0], [0.2, 0.2, 0.6]]))
