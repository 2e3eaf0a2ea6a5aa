"""The tiny model: tokens, chat template, determinism, and output worth streaming."""

import json

import pytest
import torch
from sglang.srt.parser.template_detection import detect_reasoning_pattern
from transformers import AutoModelForCausalLM, AutoTokenizer

from pascal_sglang.demo import tiny
from pascal_sglang.demo.template import CHAT_TEMPLATE, END_THINK, THINK

ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def render(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **kwargs
    )


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("<|im_end|>", tiny.END_OF_TURN_ID),
        (THINK, tiny.THINK_ID),
        (END_THINK, tiny.END_THINK_ID),
    ],
)
def test_markers_are_one_token_each(tokenizer, text, token):
    assert tokenizer.encode(text, add_special_tokens=False) == [token]
    assert tokenizer.encode(f"a{text}b", add_special_tokens=False)[1:-1] == [token]


def test_only_think_markers_show_when_special_tokens_are_skipped(tokenizer):
    ids = tokenizer.encode(f"<|im_start|>{THINK}a{END_THINK}b<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{THINK}a{END_THINK}b"


@pytest.mark.parametrize("text", ["plain", "  two  spaces \n\t", "Grüße, 世界 🙂", "a\0b", "'s  ."])
def test_any_text_round_trips_one_byte_a_token(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_prompt_opens_the_thinking(tokenizer):
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert render(tokenizer, ASKED) == expected
    assert render(tokenizer, ASKED, enable_thinking=True) == expected


def test_prompt_closes_the_thinking_at_once_when_told_to(tokenizer):
    assert render(tokenizer, ASKED, enable_thinking=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_past_turns_show_no_thinking(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASKED,
        {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nHello"},
        {"role": "user", "content": "What does </think> mean?"},
    ]
    assert render(tokenizer, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nWhat does </think> mean?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_a_turn_without_text_renders(tokenizer):
    said = render(tokenizer, [*ASKED, {"role": "assistant", "content": None}])
    assert "<|im_start|>assistant\n<|im_end|>\n" in said


def test_sglang_sees_a_model_that_thinks_unless_told_not_to():
    forced, toggle = detect_reasoning_pattern(CHAT_TEMPLATE)
    assert not forced
    assert (toggle.toggle_param, toggle.default_enabled) == ("enable_thinking", True)


def test_the_seed_decides_the_weights(folder, tmp_path):
    def weights(path):
        return (path / "model.safetensors").read_bytes()

    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert weights(tiny.build_tiny_model(tmp_path / "same")) == weights(folder)
    assert weights(tiny.build_tiny_model(tmp_path / "other", seed=1)) != weights(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shape_follows_the_arguments(tmp_path):
    path = tiny.build_tiny_model(tmp_path / "m", layers=1, hidden=64, heads=2, kv_heads=1)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "float32"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["max_position_embeddings"] == 32768


@pytest.mark.parametrize("question", ["Hi", "What is the capital of France?"])
def test_greedy_output_is_varied_text_without_markers(folder, tokenizer, question):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(render(tokenizer, [{"role": "user", "content": question}]))["input_ids"]
    ids, fed, cache = [], prompt, None
    with torch.no_grad():
        for _ in range(200):
            out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, fed = out.past_key_values, [int(out.logits[0, -1].argmax())]
            ids += fed
    assert max(ids) < tiny.END_OF_TURN_ID - 1
    assert len(set(ids)) > 30
    assert len(set(ids[-50:])) > 15
    assert all(tokenizer.decode([i]).isascii() and tokenizer.decode([i]).strip() for i in ids)
