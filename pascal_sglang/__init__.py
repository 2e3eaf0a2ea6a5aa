"""Phase-aware scheduling of reasoning models on SGLang (PASCAL, arXiv:2602.11530)."""

__version__ = "0.1.0"
