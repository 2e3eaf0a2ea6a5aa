"""A long mixed load that has to leave nothing behind; see `__main__.py`."""
