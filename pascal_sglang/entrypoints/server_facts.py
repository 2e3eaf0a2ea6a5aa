"""What `GET /pascal/status` says of the server as a whole."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from sglang.version import __version__ as sglang_version

from pascal_sglang import clock
from pascal_sglang.config import PascalConfig

# Digits that a number is shown with.
DIGITS = 6


class ServerFacts:
    """Versions, model, uptime and configuration of a server that starts now."""

    def __init__(self, manager: Any) -> None:
        """manager: SGLang's tokenizer manager, which knows the model."""
        self._manager = manager
        self._began = clock.now()

    def describe(self) -> dict[str, Any]:
        config = PascalConfig.from_env()  # It may change while the server runs.
        assert config is not None
        return {
            "version": importlib.metadata.version("pascal_sglang"),
            "sglang_version": sglang_version,
            "model": self._manager.served_model_name,
            "model_path": self._manager.model_path,
            "uptime_s": clock.now() - self._began,
            "config": config.shown(),
        }


def rounded(shown: Any) -> Any:
    """Every number in `shown` with `DIGITS` digits at most."""
    if isinstance(shown, float):
        return float(f"{shown:.{DIGITS}g}")
    if isinstance(shown, dict):
        return {key: rounded(value) for key, value in shown.items()}
    if isinstance(shown, list):
        return [rounded(value) for value in shown]
    return shown


def at_most(instance: dict[str, Any], requests: int) -> dict[str, Any]:
    """An instance with no more than that many of its live requests, and of those that ended;
    `more_requests` says how many live ones are left out."""
    live, recent = instance.get("requests", []), instance.get("recent", [])
    kept = {"requests": live[:requests], "recent": recent[-requests:] if requests else []}
    return {**instance, **kept, "more_requests": max(0, len(live) - requests)}
