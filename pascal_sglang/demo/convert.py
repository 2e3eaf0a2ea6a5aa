"""GGUF to a float32 safetensors folder with think tokens, in a process of its own.

`python -m pascal_sglang.demo.convert GGUF NEW_FOLDER`. A server that starts with `--demo` keeps
neither the memory nor the library settings that a conversion needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pascal_sglang.demo.smollm2 import (
    END_OF_TURN_ID,
    END_THINK_ID,
    NEW_LINE_ID,
    RENAMED,
    THINK_ID,
)
from pascal_sglang.demo.template import CHAT_TEMPLATE, END_THINK, THINK


def convert(gguf: Path, out: Path) -> None:
    """Write the model, its tokenizer, template and generation settings to the new folder `out`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    out.mkdir()
    weights = {
        key: value.float().contiguous().clone()
        for key, value in model.state_dict().items()
        if not (model.config.tie_word_embeddings and key == "lm_head.weight")
    }
    # The renamed tokens' own embeddings mean nothing in a chat and derail the model. Half of a line
    # break's reads like a line break, and can never outscore it where one is due.
    embedding = weights["model.embed_tokens.weight"]
    embedding[[THINK_ID, END_THINK_ID]] = 0.5 * embedding[NEW_LINE_ID]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for gone in ("quantization_config", "_name_or_path"):
        config.pop(gone, None)
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    rename_tokens(out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TURN_ID}))
    check_tokens(out)


def rename_tokens(folder: Path) -> None:
    """Give the unused tokens their new names wherever the tokenizer files spell them.

    They become ordinary added tokens (not special): the reasoning parser has to see them in the
    text.
    """
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        if token["content"] in RENAMED:
            token |= {"content": RENAMED[token["content"]], "special": False}
    vocabulary = spec["model"]["vocab"]
    for old, new in RENAMED.items():
        vocabulary[new] = vocabulary.pop(old)
    file.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for token in settings.get("added_tokens_decoder", {}).values():
        if token["content"] in RENAMED:
            token |= {"content": RENAMED[token["content"]], "special": False}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [t for t in settings[key] if t not in RENAMED]
    settings_file.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def check_tokens(folder: Path) -> None:
    """Raise `ValueError` unless the ids the package relies on are the tokenizer's, one token each.

    Also tried without the special tokens, as a server decodes: the think markers must stay.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = {
        THINK: THINK_ID,
        END_THINK: END_THINK_ID,
        "\n": NEW_LINE_ID,
        "<|im_end|>": END_OF_TURN_ID,
    }
    for text, expected in wanted.items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != [expected]:
            raise ValueError(f"{text!r} became {found} in the demo tokenizer, not {expected}")
    shown = tokenizer.decode([THINK_ID, END_THINK_ID, END_OF_TURN_ID], skip_special_tokens=True)
    if shown != THINK + END_THINK:
        raise ValueError(f"the demo tokenizer shows the think tokens as {shown!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pascal_sglang.demo.convert GGUF NEW_FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
