"""Logit processors that clients send: Python code, which SGLang runs in the scheduler.

`--demo` needs processors for its own thinking budget. SGLang answers web pages of every origin, so
that alone must not let whatever page its user looks at run code.
"""

from __future__ import annotations

from typing import Any

from pascal_sglang.config import PascalConfig


def refuse(_manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `TokenizerManager._validate_one_request`. Raises: ValueError, as SGLang does where its
    flag is not given."""
    config = PascalConfig.from_env()
    if config is None or config.client_processors:
        return
    if getattr(obj, "custom_logit_processor", None):
        raise ValueError(
            "This server takes no logit processors from clients. "
            "Start it with `--enable-custom-logit-processor` if you trust all of them."
        )
