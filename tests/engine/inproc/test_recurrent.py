"""A pool of recurrent states (GDN layers of Qwen3-Next): right, and paused with the same tokens."""

import pytest

from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.models import qwen3_next

PLAIN = ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return qwen3_next(tmp_path_factory.mktemp("qwen3_next"))


def requests(count, **options):
    """Some longer than a chunk of the kernels, and some with a prefix that others have too."""
    return [
        Request(
            ids=[97 + (7 * (i % 6) + j) % 26 for j in range(10 + 25 * (i % 6))],
            params={"max_new_tokens": 30 + 5 * (i % 5)},
            options=options,
        )
        for i in range(count)
    ]


def test_it_is_hugging_faces_model(model):
    """Greedy tokens and their log probabilities, over several chunks of prefill and a cached
    prefix."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = requests(8, return_logprob=True)
    flags = [*PLAIN, "--max-total-tokens", "4096", "--chunked-prefill-size", "128"]
    found = run(model, asked, flags=flags)
    assert found.kinds["attention"] == "HybridLinearAttnBackend"
    for request, output, logprobs in zip(asked, found.outputs, found.logprobs, strict=True):
        ids = torch.tensor([[*request.ids, *output]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(request.ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == output
        expected = logits.log_softmax(-1).gather(1, torch.tensor(output).unsqueeze(1))[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}


@pytest.fixture(scope="module")
def stock(model):
    return run(model, requests(24), flags=[*PLAIN, "--max-total-tokens", "8192"])


def pauses_change_no_token(model, stock, *flags):
    paused = run(model, requests(24), CHAOS, [*flags, "--max-total-tokens", "1500"])
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.status["policy_errors"] == 0
    assert paused.free == paused.capacity
    return paused


def test_pauses_change_no_token(model, stock):
    paused = pauses_change_no_token(model, stock, *PLAIN)
    assert paused.kinds["scheduler"] == "PascalScheduler"


def test_states_are_a_capacity_of_their_own(model, stock):
    """Four requests may run, and what waits resident takes the states from those that would."""
    pauses_change_no_token(model, stock, *PLAIN, "--max-mamba-cache-size", "12")
