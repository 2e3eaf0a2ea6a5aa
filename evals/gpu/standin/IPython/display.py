"""What `sglang.utils` imports of it."""

from __future__ import annotations

from typing import Any


def HTML(*_: Any, **__: Any) -> None:
    """Shows nothing."""


def display(*_: Any, **__: Any) -> None:
    """Shows nothing."""
