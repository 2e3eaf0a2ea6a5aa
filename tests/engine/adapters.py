"""LoRA adapters of the tiny model, and what serves them on a machine without a device.

As a program it is `sglang`, which can serve them then.
"""

import json
import sys
import uuid
from itertools import product


def build(model, folder):
    """Write three adapters.

    Returns: by name, the folder of each, as SGLang takes it in `--lora-paths`, and the id that
    SGLang gives it then.
    """
    from safetensors.torch import save_file
    from torch import Generator, randn

    config = json.loads((model / "config.json").read_text())
    width, dice = config["hidden_size"], Generator().manual_seed(0)
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    made = {}
    for name in "abc":
        path = folder / name
        path.mkdir()
        adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
        adapter |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": ""}
        (path / "adapter_config.json").write_text(json.dumps(adapter))
        weights = {}
        layers = range(config["num_hidden_layers"])
        for layer, (module, out) in product(layers, (("q_proj", width), ("v_proj", keys))):
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{at}.lora_A.weight"] = randn(4, width, generator=dice) / width**0.5
            weights[f"{at}.lora_B.weight"] = randn(out, 4, generator=dice)
        save_file(weights, path / "adapter_model.safetensors")
        made[name] = path, uuid.uuid5(uuid.NAMESPACE_URL, f"{name}\0{path}").hex
    return made


def flags(made):
    """What serves them; a batch takes two, or one beside requests without any."""
    paths = (f"{name}={path}" for name, (path, _) in made.items())
    backend = ["--lora-backend", "torch_native", "--max-loras-per-batch", "2"]
    return [*backend, "--lora-paths", *paths]


def pin_nothing():
    """SGLang pins what its LoRA backends make on the host, and there is no device to pin it for."""
    import torch

    def unpinned(make):
        return lambda *args, pin_memory=False, **more: make(*args, **more)

    torch.Tensor.pin_memory = lambda tensor: tensor
    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))


if __name__ == "__main__":
    from sglang.cli.main import main

    pin_nothing()
    sys.exit(main())
