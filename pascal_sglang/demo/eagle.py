"""An EAGLE head for a tiny model, for speculative decoding on a CPU.

`python -m pascal_sglang.demo.eagle MODEL OUT_DIR` builds it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How far the layer that a head has besides its projection changes what that says.
LAYER_SCALE = 0.3


def eagle_head(target: Path, out: Path) -> Path:
    """Write a head that goes on from the target model's hidden states and the next token; returns
    `out`. Its projection is fitted to what the target model writes. The same model gives the same
    head."""
    import torch

    architecture = {"architectures": ["Qwen2ForCausalLMEagle"], "num_hidden_layers": 1}
    config = copy_config(target, out, architecture)
    weights = {"fc.weight": _fitted(target).T, "fc.bias": torch.zeros(config["hidden_size"])}
    for name, weight in random_layer(config).items():
        if "input_layernorm" not in name:
            weights[f"layers.0.{name}"] = weight
    save_weights(out, weights)
    return out


def copy_config(target: Path, out: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A model's folder without its weights, at `out`; its configuration there, changed."""
    shutil.copytree(target, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config: dict[str, Any] = json.loads((out / "config.json").read_text()) | dict(changes)
    config.pop("layer_types", None)
    (out / "config.json").write_text(json.dumps(config))
    return config


def save_weights(out: Path, weights: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})


def random_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a random layer as Qwen2 has them, by name."""
    import torch

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    dice = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=dice) * 0.1

    return {
        "input_layernorm.weight": torch.ones(hidden),
        "post_attention_layernorm.weight": torch.ones(hidden),
        "self_attn.q_proj.weight": random(hidden, hidden),
        "self_attn.k_proj.weight": random(kv, hidden),
        "self_attn.v_proj.weight": random(kv, hidden),
        "self_attn.q_proj.bias": random(hidden),
        "self_attn.k_proj.bias": random(kv),
        "self_attn.v_proj.bias": random(kv),
        "self_attn.o_proj.weight": LAYER_SCALE * random(hidden, hidden),
        "mlp.gate_proj.weight": random(inner, hidden),
        "mlp.up_proj.weight": random(inner, hidden),
        "mlp.down_proj.weight": LAYER_SCALE * random(hidden, inner),
    }


def _fitted(target: Path) -> Any:
    """The projection, of shape (2 * hidden, hidden), of a token's embedding and the hidden state
    before it that comes closest to the next hidden state, over what the target model writes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prompts = torch.tensor([[97 + (7 * i + j) % 26 for j in range(20)] for i in range(26)])
    with torch.no_grad():
        text = model.generate(prompts, max_new_tokens=60, do_sample=False, eos_token_id=None)
        hidden = model.model(text).last_hidden_state
        known = torch.cat([model.model.embed_tokens(text[:, 1:]), hidden[:, :-1]], -1)
    return torch.linalg.lstsq(known.flatten(0, 1), hidden[:, 1:].flatten(0, 1)).solution


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build an EAGLE head for a tiny model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args()
    print(eagle_head(options.model, options.out_dir))
