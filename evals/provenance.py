"""What a result has to say of where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.load.remote import without_keys
from pascal_sglang.sim.experiments import provenance as of_checkout

PACKAGES = ("pascal_sglang", "sglang", "torch", "numpy")


def provenance(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The command that was given to `module`, without keys; commit, versions and machine on this
    side, and the date."""
    told = of_checkout.provenance(module, arguments, PACKAGES)
    return {**told, "command": without_keys(told["command"])}
