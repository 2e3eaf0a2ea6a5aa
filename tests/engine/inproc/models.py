"""Tiny random models (float32) of the architectures that people run, with the demo's tokenizer."""

from pathlib import Path

from pascal_sglang.demo.tiny import _WRITTEN, END_OF_TURN_ID, VOCABULARY, tokenizer


def save(out_dir: Path, config, seed: int) -> Path:
    """Write a random model of that configuration; its outputs are letters and digits."""
    import torch
    from transformers import AutoModelForCausalLM

    bytewise = tokenizer()
    out_dir.mkdir(parents=True, exist_ok=True)
    bytewise.save_pretrained(out_dir)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        # Norms and biases that do nothing would hide one that is left out.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    unlikely = torch.ones(VOCABULARY, dtype=torch.bool)
    unlikely[bytewise.convert_tokens_to_ids(list(_WRITTEN))] = False
    with torch.no_grad():
        model.lm_head.weight[unlikely] *= 0.01
    model.save_pretrained(out_dir)
    return out_dir


def qwen3_next(out_dir: Path, seed: int = 0) -> Path:
    """Three layers with a recurrent state (GDN), then one of full attention; experts in all."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
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
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END_OF_TURN_ID,
        pad_token_id=END_OF_TURN_ID,
    )
    # SGLang reads the interval, not Hugging Face's list of layers.
    config.full_attention_interval = 4
    return save(out_dir, config, seed)
