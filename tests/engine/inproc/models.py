"""Tiny random models (float32) of the families that people run, with the demo's tokenizer.

What each writes is noise. The reference is Hugging Face's code, which reads the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pascal_sglang.demo.tiny import _WRITTEN, END_OF_TURN_ID, VOCABULARY, tokenizer

# Tokens that a layer with a window sees.
WINDOW = 24
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": END_OF_TURN_ID,
    "pad_token_id": END_OF_TURN_ID,
    # Wide enough that greedy output wanders instead of repeating one token.
    "initializer_range": 0.2,
}


def _gpt_oss() -> Any:
    """Full attention and windows in turn, sinks, experts; a pool with sliding windows."""
    from transformers import GptOssConfig

    return GptOssConfig(
        **COMMON,
        intermediate_size=64,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )


def _deepseek_v3() -> Any:
    """MLA, and experts of which one is shared."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **COMMON,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=48,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_mtp_layers=0,
        # SGLang's rotary embedding on CPUs is this one alone.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    # Read by SGLang's model alone.
    config.moe_layer_freq, config.topk_method, config.scoring_func = 1, "noaux_tc", "sigmoid"
    return config


def _gemma2() -> Any:
    """Logit caps, windows without a pool of their own, and a scale that is not by the head."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=None,  # SGLang has only a GPU kernel for it.
    )
    config.hidden_act = config.hidden_activation  # The name that SGLang reads.
    return config


def _qwen3_next() -> Any:
    """Three layers with a recurrent state (GDN), then one of full attention; experts in all."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        **COMMON,
        intermediate_size=64,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    # SGLang reads the interval, not Hugging Face's list of layers.
    config.full_attention_interval = 4
    return config


def _qwen3() -> Any:
    """A plain dense model; SGLang's takes part in DP attention, and that of Qwen2 does not."""
    from transformers import Qwen3Config

    return Qwen3Config(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "gemma2": _gemma2,
    "qwen3_next": _qwen3_next,
    "qwen3": _qwen3,
}
# What SGLang needs to be told, by family.
FLAGS: dict[str, Sequence[str]] = {
    "gpt_oss": ("--moe-runner-backend", "triton"),
    "deepseek_v3": (),
    "gemma2": (),
    "qwen3_next": (),
    "qwen3": (),
}


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of `family`, whose outputs are letters and digits; returns `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    bytewise = tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    bytewise.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]()).float()
        # Norms and biases that do nothing would hide one that is left out.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            if name.endswith("sinks"):  # SGLang keeps them in bfloat16.
                parameter.copy_(parameter.bfloat16())
        if model.config.tie_word_embeddings:
            # What is read and what is written are one: the input would be repeated.
            model.get_input_embeddings().weight *= 0.25
        else:
            unlikely = torch.ones(VOCABULARY, dtype=torch.bool)
            unlikely[bytewise.convert_tokens_to_ids(list(_WRITTEN))] = False
            model.lm_head.weight[unlikely] *= 0.01
    model.save_pretrained(folder)
    return folder


def qwen3_next(folder: Path, seed: int = 0) -> Path:
    return build("qwen3_next", folder, seed)


def greedy(folder: Path, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[list, list]]:
    """Hugging Face's greedy tokens after each prompt, and their log probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for prompt in prompts:
        ids, logprobs = list(prompt), []
        for _ in range(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        found.append((ids[len(prompt) :], logprobs))
    return found
