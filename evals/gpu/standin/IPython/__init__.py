"""In the place of IPython: SGLang imports it for notebooks."""
