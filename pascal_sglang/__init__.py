"""Phase-aware scheduling of reasoning models on SGLang (PASCAL, arXiv:2602.11530)."""
