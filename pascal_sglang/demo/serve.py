"""What `--demo` stands for: arguments that serve the demo model on a CPU."""

from __future__ import annotations

import dataclasses
import sys

from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.demo.smollm2 import DemoModelError, default_cache_dir, prepare_demo_model

THINKING_BUDGET_TOKENS = 48

_DEFAULTS = {
    "--served-model-name": "smollm2-thinking",
    "--reasoning-parser": "qwen3",
    "--device": "cpu",
    "--dtype": "float32",
    "--context-length": "4096",
    "--max-total-tokens": "16384",
    "--max-running-requests": "32",
    "--enable-custom-logit-processor": None,
    "--enable-metrics": None,
    "--log-level": "warning",
}


def demo_arguments(config: PascalConfig, argv: list[str]) -> tuple[PascalConfig, list[str]]:
    """The configuration and SGLang arguments of the demo; flags given by the user win.

    Prepares the model on first use. Raises `LaunchError` with one line if that fails.
    """
    if any(arg.partition("=")[0] in ("--model-path", "--model") for arg in argv):
        raise LaunchError("--demo brings its own model; drop --model-path or --demo")
    try:
        model = prepare_demo_model(
            default_cache_dir(), lambda line: print(line, file=sys.stderr, flush=True)
        )
    except DemoModelError as error:
        raise LaunchError(str(error)) from error
    given = {arg.partition("=")[0] for arg in argv}
    arguments = ["--model-path", str(model)]
    for flag, value in _DEFAULTS.items():
        if flag not in given:
            arguments += [flag] if value is None else [flag, value]
    if "--enable-custom-logit-processor" not in given:
        config = dataclasses.replace(config, client_processors=False)
    budget = config.default_thinking_budget
    if budget is None:
        config = dataclasses.replace(config, default_thinking_budget=THINKING_BUDGET_TOKENS)
    return config, [*arguments, *argv]
