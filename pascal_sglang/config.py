"""One frozen configuration, handed to every process as JSON in `PASCAL_SGLANG_CONFIG`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

CONFIG_ENV = "PASCAL_SGLANG_CONFIG"

POLICIES = ("fcfs",)


class ConfigError(ValueError):
    """A configuration value that cannot be served; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PascalConfig:
    """What `--pascal-*` decided.

    policy: name of the scheduling policy, one of `POLICIES`.
    assume_reasoning: `/generate` requests that do not say `require_reasoning` count as reasoning.
    default_thinking_budget: thinking tokens after which a request without a logit processor of its
        own is made to close its thinking; None leaves requests alone. Set by `--demo`.
    """

    policy: str = "fcfs"
    assume_reasoning: bool = False
    default_thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        _require(isinstance(self.assume_reasoning, bool), "assume_reasoning must be true or false")
        budget = self.default_thinking_budget
        _require(
            budget is None or (isinstance(budget, int) and not isinstance(budget, bool)),
            "default_thinking_budget must be a whole number of tokens",
        )
        _require(budget is None or budget >= 0, "default_thinking_budget must not be negative")

    @classmethod
    def from_json(cls, text: str) -> PascalConfig:
        """Parse the value of `PASCAL_SGLANG_CONFIG`; unknown keys are errors, not surprises."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{CONFIG_ENV} is not JSON: {error}") from error
        _require(isinstance(values, dict), f"{CONFIG_ENV} must hold a JSON object")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"{CONFIG_ENV} has unknown keys: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> PascalConfig | None:
        """The configuration of this process, or None where nobody asked for pascal_sglang."""
        text = environ.get(CONFIG_ENV)
        return cls.from_json(text) if text else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def banner(self) -> str:
        """The one start line: policy first, then every value."""
        values = dataclasses.asdict(self)
        values.pop("policy")
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        return f"pascal_sglang: policy={self.policy} {shown}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--pascal-*` flags; defaults are `PascalConfig`'s own."""
    defaults = PascalConfig()
    group = parser.add_argument_group("pascal_sglang")
    group.add_argument(
        "--pascal-policy",
        choices=POLICIES,
        default=defaults.policy,
        help="fcfs leaves SGLang's own order untouched and only measures (default: %(default)s)",
    )
    group.add_argument(
        "--pascal-assume-reasoning",
        action="store_true",
        default=defaults.assume_reasoning,
        help="treat /generate requests that do not say require_reasoning as reasoning",
    )


def from_flags(options: argparse.Namespace) -> PascalConfig:
    """Build the configuration from parsed `--pascal-*` flags."""
    return PascalConfig(
        policy=options.pascal_policy, assume_reasoning=options.pascal_assume_reasoning
    )
