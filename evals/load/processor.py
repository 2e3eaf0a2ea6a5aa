"""The serialized logit processor that ends thinking where the workload says, as users name it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NATURAL = "none"
PRINT = "import {module}; print({module}.{name}.to_str())"


class ProcessorError(ValueError):
    """A processor that cannot be had; the message is one line."""


def resolve(text: str) -> str:
    """The serialized processor of `text`; empty for natural lengths.

    text: `none`; `module:Class` of a processor installed here; a file that holds the serialized
        form; or that form itself, which is JSON.
    """
    if text == NATURAL:
        return ""
    if text.lstrip().startswith("{"):
        return text
    if Path(text).is_file():
        return Path(text).read_text().strip()
    module, colon, name = text.partition(":")
    if not (colon and name.isidentifier() and all(p.isidentifier() for p in module.split("."))):
        raise ProcessorError(f"{text}: not a file, not module:Class, not a serialized processor")
    return _serialized(module, name)


def _serialized(module: str, name: str) -> str:
    """In a process of its own: a processor's module imports the whole engine."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(module=module, name=name)],
        capture_output=True,
        text=True,
    )
    words = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = words[-1] if words else "no output"
    if done.returncode:
        raise ProcessorError(f"{module}:{name}: {last}")
    return last
