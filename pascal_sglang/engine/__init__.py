"""The only code that touches a live SGLang scheduler."""
