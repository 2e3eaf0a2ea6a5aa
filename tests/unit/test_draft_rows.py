"""What a draft model keeps of a request, on its way to another instance."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.kv import drafts
from pascal_sglang.engine.migration.draft_rows import DraftRow, pack, unpack

STATE = {
    "bonus_tokens": torch.tensor([7]),
    "topk_p": torch.tensor([[1.0]]),
    "topk_index": torch.tensor([[9]]),
    "hidden_states": torch.randn(1, 4).bfloat16(),
}


def target(monkeypatch, algorithm=SpeculativeAlgorithm.EAGLE):
    monkeypatch.setattr(drafts, "get_spec", lambda: SimpleNamespace(speculative_eagle_topk=1))
    width = (None, None) if algorithm.is_standalone() else (4, torch.bfloat16)
    monkeypatch.setattr(drafts, "get_draft_recurrent_hidden_state_spec", lambda runner: width)
    return SimpleNamespace(
        spec_algorithm=algorithm,
        draft_worker=SimpleNamespace(_draft_model_runners=lambda: [None]),
        model_config=SimpleNamespace(vocab_size=20),
        device="cpu",
    )


def test_they_arrive_as_they_were(monkeypatch):
    found = unpack(pack(STATE), target(monkeypatch))
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype is tensor.dtype


def test_without_a_draft_model_there_are_none(monkeypatch):
    plain = target(monkeypatch, SpeculativeAlgorithm.NONE)
    assert unpack(pack(None), plain) is None
    with pytest.raises(ValueError, match="not here"):
        unpack(pack(STATE), plain)


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("hidden_states", DraftRow("bfloat16", [5], bytes(10)), "another form"),
        ("hidden_states", DraftRow("float32", [4], bytes(16)), "another form"),
        ("hidden_states", DraftRow("bfloat16", [4], bytes(6)), "another form"),
        ("bonus_tokens", DraftRow("int64", [], (20).to_bytes(8, "little")), "no token"),
        ("topk_index", DraftRow("int64", [1], b"\xff" * 8), "no token"),
        ("draft_probs", DraftRow("float32", [4], bytes(16)), "other rows"),
    ],
)
def test_others_are_refused(name, row, why, monkeypatch):
    with pytest.raises(ValueError, match=why):
        unpack({**pack(STATE), name: row}, target(monkeypatch))


def test_each_is_needed(monkeypatch):
    for name in STATE:
        rows = pack(STATE)
        del rows[name]
        with pytest.raises(ValueError, match="other rows"):
            unpack(rows, target(monkeypatch))
