"""Models of a published architecture without their weights, for `--load-format dummy`.

`python -m pascal_sglang.demo.dummy MODEL OUT_DIR` writes the configuration and the tiny model's
byte-level tokenizer. What it writes is noise, at the cost and with the KV of the real one; how long
it thinks is up to `DummyThinkingBudget`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pascal_sglang.demo.tiny import END_OF_TURN_ID, tokenizer

# From the published config.json of each. KV per token in bf16: 56 KiB and 256 KiB.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "r1-distill-qwen-32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}


def write_dummy_model(name: str, out_dir: Path) -> Path:
    """Write the configuration of `ARCHITECTURES[name]` and a tokenizer; returns `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(out_dir)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": END_OF_TURN_ID,
        "pad_token_id": END_OF_TURN_ID,
        **ARCHITECTURES[name],
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=1))
    return out_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a model's configuration, without weights.")
    parser.add_argument("model", choices=ARCHITECTURES)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args()
    print(write_dummy_model(options.model, options.out_dir))
