"""A tiny random model with think tokens: thousands of tokens per second on two cores.

`python -m pascal_sglang.demo.tiny OUT_DIR` builds it. What it writes is noise; how long it thinks
and answers is up to `TinyThinkingBudget` and `max_new_tokens`.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any

from pascal_sglang.demo.template import CHAT_TEMPLATE, END_THINK, THINK

# The byte alphabet takes ids 0 to 255; the tokens below follow in this order.
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
LETTER_IDS = (64, 89)  # a to z
END_OF_TURN_ID = 257
THINK_ID = 258
END_THINK_ID = 259
VOCABULARY = 260
WIDE = {"hidden": 1024, "heads": 8, "kv_heads": 2}
# Read as text at once: bytes of half a character would wait in the detokenizer for the rest, and
# white space or a "<" may be held back by the reasoning parser.
_WRITTEN = string.ascii_letters + string.digits + ".,"


def build_tiny_model(
    out_dir: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    max_position: int = 32768,
) -> Path:
    """Write a random Qwen2 (float32) and its byte-level tokenizer to `out_dir`; returns `out_dir`.

    Every id is one byte or one marker, so any UTF-8 text round-trips. What the model writes is
    letters and digits, one a token. The same seed gives the same weights.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    out_dir.mkdir(parents=True, exist_ok=True)
    bytewise = tokenizer()
    bytewise.save_pretrained(out_dir)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_position,
        tie_word_embeddings=False,
        # Wide enough that greedy output wanders instead of repeating one token.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END_OF_TURN_ID,
        pad_token_id=END_OF_TURN_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    # Markers come when a request asks for them, not by chance.
    unlikely = torch.ones(VOCABULARY, dtype=torch.bool)
    unlikely[bytewise.convert_tokens_to_ids(list(_WRITTEN))] = False
    with torch.no_grad():
        model.lm_head.weight[unlikely] *= 0.01
    model.save_pretrained(out_dir)
    return out_dir


def tokenizer() -> Any:
    """One id per byte or marker, as a Hugging Face tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    # Not special: the reasoning parser must see them in text decoded without special tokens.
    inner.add_tokens([AddedToken(t, special=False) for t in (THINK, END_THINK)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the tiny model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wide", action="store_true", help="eight heads of 128, as GPUs want them")
    options = parser.parse_args()
    shape = WIDE if options.wide else {}
    print(build_tiny_model(options.out_dir, seed=options.seed, **shape))
