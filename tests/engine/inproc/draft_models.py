"""Tiny draft models for a tiny target model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# How far the layers that a head has besides its projection change what that says.
LAYER_SCALE = 0.3


def imprecise_copy(target: Path, out: Path, *, noise: float = 0.05) -> Path:
    """The target model, each weight off by a share of its spread: right about every second time."""
    shutil.copytree(target, out)
    weights = load_file(out / "model.safetensors")
    dice = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        off = torch.randn(weight.shape, generator=dice)
        weights[name] = weight + noise * weight.std() * off
    _save(out, weights)
    return out


def eagle_head(target: Path, out: Path) -> Path:
    """A head that goes on from the target model's hidden states and the next token. Its projection
    is fitted to what the target model writes."""
    config = _config(target, out, architectures=["Qwen2ForCausalLMEagle"], num_hidden_layers=1)
    hidden = config["hidden_size"]
    weights = {"fc.weight": _fitted(target).T, "fc.bias": torch.zeros(hidden)}
    layer = {
        name: weight for name, weight in _layer(config).items() if "input_layernorm" not in name
    }
    _save(out, {**weights, **{f"layers.0.{name}": weight for name, weight in layer.items()}})
    return out


def eagle3_head(target: Path, out: Path) -> Path:
    """A head that reads the hidden states of the target model's first three layers."""
    config = _config(
        target,
        out,
        architectures=["LlamaForCausalLMEagle3"],
        model_type="llama",
        num_hidden_layers=1,
        draft_vocab_size=None,
        eagle_config={"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    )
    hidden, layer = config["hidden_size"], _layer(config)
    dice = torch.Generator().manual_seed(2)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.pop(f"self_attn.{name}.bias")
        narrow = layer[f"self_attn.{name}.weight"]
        layer[f"self_attn.{name}.weight"] = torch.cat([narrow, narrow], 1)
    weights = {
        "fc.weight": torch.randn(hidden, 3 * hidden, generator=dice) * 0.05,
        "norm.weight": torch.ones(hidden),
        "midlayer.hidden_norm.weight": torch.ones(hidden),
    }
    _save(out, {**weights, **{f"midlayer.{name}": weight for name, weight in layer.items()}})
    return out


def with_token_predictor(target: Path, out: Path) -> Path:
    """The target model as a MiMo, which brings a layer that predicts the token after the next."""
    config = _config(target, out, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    hidden = config["hidden_size"]
    dice = torch.Generator().manual_seed(3)
    more = {
        "token_layernorm.weight": torch.ones(hidden),
        "hidden_layernorm.weight": torch.ones(hidden),
        "final_layernorm.weight": torch.ones(hidden),
        "input_proj.weight": torch.randn(hidden, 2 * hidden, generator=dice) * 0.1,
        **_layer(config),
    }
    weights = load_file(target / "model.safetensors")
    _save(out, weights | {f"model.mtp_layers.0.{name}": weight for name, weight in more.items()})
    return out


def _config(target: Path, out: Path, **changes: object) -> dict[str, int]:
    shutil.copytree(target, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config: dict[str, int] = json.loads((out / "config.json").read_text()) | changes
    config.pop("layer_types", None)
    (out / "config.json").write_text(json.dumps(config))
    return config


def _save(out: Path, weights: dict[str, torch.Tensor]) -> None:
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})


def _layer(config: dict[str, int]) -> dict[str, torch.Tensor]:
    """A random layer as Qwen2 has them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    dice = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
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


def _fitted(target: Path) -> torch.Tensor:
    """The projection, of shape (2 * hidden, hidden), of a token's embedding and the hidden state
    before it that comes closest to the next hidden state, over what the target model writes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prompts = torch.tensor([[97 + (7 * i + j) % 26 for j in range(20)] for i in range(26)])
    with torch.no_grad():
        text = model.generate(prompts, max_new_tokens=60, do_sample=False, eos_token_id=None)
        hidden = model.model(text).last_hidden_state
        known = torch.cat([model.model.embed_tokens(text[:, 1:]), hidden[:, :-1]], -1)
    return torch.linalg.lstsq(known.flatten(0, 1), hidden[:, 1:].flatten(0, 1)).solution
