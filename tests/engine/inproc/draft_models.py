"""Tiny draft models for a tiny target model, beside the EAGLE head of `demo.eagle`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from pascal_sglang.demo.eagle import copy_config, random_layer, save_weights


def imprecise_copy(target: Path, out: Path, *, noise: float = 0.05) -> Path:
    """The target model, each weight off by a share of its spread: right about every second time."""
    shutil.copytree(target, out)
    weights = load_file(out / "model.safetensors")
    dice = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        off = torch.randn(weight.shape, generator=dice)
        weights[name] = weight + noise * weight.std() * off
    save_weights(out, weights)
    return out


def eagle3_head(target: Path, out: Path) -> Path:
    """A head that reads the hidden states of the target model's first three layers."""
    changes = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": None,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        },
    }
    config = copy_config(target, out, changes)
    hidden, layer = config["hidden_size"], random_layer(config)
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
    save_weights(out, {**weights, **{f"midlayer.{name}": weight for name, weight in layer.items()}})
    return out


def with_token_predictor(target: Path, out: Path) -> Path:
    """The target model as a MiMo, which brings a layer that predicts the token after the next."""
    changes = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    config = copy_config(target, out, changes)
    hidden = config["hidden_size"]
    dice = torch.Generator().manual_seed(3)
    more = {
        "token_layernorm.weight": torch.ones(hidden),
        "hidden_layernorm.weight": torch.ones(hidden),
        "final_layernorm.weight": torch.ones(hidden),
        "input_proj.weight": torch.randn(hidden, 2 * hidden, generator=dice) * 0.1,
        **random_layer(config),
    }
    weights = load_file(target / "model.safetensors")
    predictor = {f"model.mtp_layers.0.{name}": weight for name, weight in more.items()}
    save_weights(out, weights | predictor)
    return out
