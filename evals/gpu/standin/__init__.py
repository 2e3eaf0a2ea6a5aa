"""Modules that SGLang imports and the offline kit does not carry; `kit.py` puts them into it."""
