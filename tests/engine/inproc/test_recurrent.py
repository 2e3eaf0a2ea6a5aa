"""A pool of recurrent states (GDN layers of Qwen3-Next): right, and paused with the same tokens."""

import pytest

from tests.engine.inproc import late, loopback
from tests.engine.inproc.bed import Request, run
from tests.engine.inproc.conftest import HYBRID_POOLS, LATE_DEVICE
from tests.engine.inproc.models import qwen3_next

pytestmark = HYBRID_POOLS
# By itself SGLang takes a share of the machine's memory for states.
STATES = ["--max-mamba-cache-size", "320"]
PLAIN = ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule", *STATES]
# SGLang's default on CUDA: with overlap, and states for the prefix cache taken while decoding.
TRACKED = ["--mamba-radix-cache-strategy", "extra_buffer", "--mamba-track-interval", "64", *STATES]
# With one slot less for each request, and the states of cached prefixes in host memory too.
HIERARCHICAL = (
    "--mamba-radix-cache-strategy extra_buffer_lazy --mamba-track-interval 64 "
    "--max-mamba-cache-size 60 --enable-hierarchical-cache --hicache-io-backend direct "
    "--hicache-mem-layout page_first_direct --hicache-ratio 3"
).split()
CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
# Tokens of a first turn, and of all.
FIRST, WHOLE = 8, 50
TURNS = 9


def prompt(i):
    """Some are longer than a chunk of the kernels; all of them begin alike."""
    return [97 + (7 * (j > 60) * i + j) % 26 for j in range(10 + 25 * i)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return qwen3_next(tmp_path_factory.mktemp("qwen3_next"))


@pytest.fixture(scope="module")
def answers(model):
    """What stock SGLang answers to each prompt, and the log probabilities."""
    asked = [
        Request(ids=prompt(i), params={"max_new_tokens": WHOLE}, options={"return_logprob": True})
        for i in range(TURNS)
    ]
    flags = [*PLAIN, "--max-total-tokens", "8192", "--chunked-prefill-size", "128"]
    found = run(model, asked, flags=flags)
    assert found.kinds["attention"] == "HybridLinearAttnBackend"
    return found


def test_it_is_hugging_faces_model(model, answers):
    """Greedy tokens and their log probabilities, over chunks of prefill and cached prefixes."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for i, (output, logprobs) in enumerate(zip(answers.outputs, answers.logprobs, strict=True)):
        ids = torch.tensor([[*prompt(i), *output]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt(i)) - 1 : -1]
        assert logits.argmax(-1).tolist() == output
        expected = logits.log_softmax(-1).gather(1, torch.tensor(output).unsqueeze(1))[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


def paused_with_the_same_tokens(model, answers, flags, settings=CHAOS, **hooks):
    """First turns, others, and then what follows on the first turns, whose states are cached."""
    turns = [(prompt(i), FIRST) for i in range(TURNS)]
    turns += [(prompt(i), WHOLE) for i in range(TURNS)]
    turns += [(prompt(i) + answers.outputs[i][:FIRST], WHOLE - FIRST) for i in range(TURNS)]
    asked = [Request(ids=ids, params={"max_new_tokens": count}) for ids, count in turns]
    paused = run(model, asked, settings, flags, **hooks)
    expected = [output[:FIRST] for output in answers.outputs] + answers.outputs
    expected += [output[FIRST:] for output in answers.outputs]
    assert [i for i in range(len(asked)) if paused.outputs[i] != expected[i]] == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.status["policy_errors"] == 0
    assert paused.free == paused.capacity
    states = paused.status["recurrent_states"]
    assert states["free"] == states["capacity"]
    assert any(hit > len(prompt(i)) - 64 > 0 for i, hit in enumerate(paused.cached[-TURNS:]))
    return paused


@pytest.mark.parametrize("flags", [PLAIN, TRACKED, HIERARCHICAL])
def test_pauses_change_no_token(model, answers, flags):
    flags = [*flags, "--max-total-tokens", "2000"]
    paused = paused_with_the_same_tokens(model, answers, flags)
    assert paused.kinds["overlap"] == (flags[1] != "no_buffer")


def test_moves_change_no_token(model, answers):
    """The state goes when the request stops; all slots of both sides come back."""
    flags = [*TRACKED, "--max-total-tokens", "4096"]
    settings = {**CHAOS, "migration": "always"}
    moved = paused_with_the_same_tokens(model, answers, flags, settings, **loopback.HOOKS)
    assert moved.status["support"] == {"level": "move", "lowered_by": []}
    loopback.assert_moved(moved)


@pytest.mark.parametrize(
    "hooks",
    [pytest.param({}, id=""), pytest.param(late.PAUSES, id="late device", marks=LATE_DEVICE)],
)
def test_states_are_a_capacity_of_their_own(model, answers, hooks):
    """There is KV for all, and states for four that run: whose state stays on the device gives it
    up for others."""
    flags = [*TRACKED, "--max-total-tokens", "16384", "--max-mamba-cache-size", "20"]
    paused = paused_with_the_same_tokens(model, answers, flags, **hooks)
    assert paused.pauses["spilled"] > 5
