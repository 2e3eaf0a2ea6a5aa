"""Masks of tokens on a CPU. SGLang applies those of grammars there; for those of strict thinking
alone, which end it after a budget, it has no code and raises."""

from __future__ import annotations

import torch


def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """`XGrammarGrammarBackend.apply_vocab_mask`: tokens that the mask leaves out get no chance."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


def install() -> None:
    """Put it in the place of SGLang's."""
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    XGrammarGrammarBackend.apply_vocab_mask = staticmethod(apply_vocab_mask)
