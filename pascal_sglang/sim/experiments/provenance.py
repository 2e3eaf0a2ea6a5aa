"""What a result has to say of where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def provenance(
    module: str, arguments: Sequence[str], packages: Sequence[str] = ("numpy", "pascal_sglang")
) -> dict[str, Any]:
    """Command, commit, versions of what is installed of `packages`, machine and date of a run."""
    versions = {"python": platform.python_version()}
    for package in packages:
        # A checkout need not be installed; its commit says more.
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "commit": commit(),
        "versions": versions,
        "machine": f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def commit(root: Path = ROOT) -> str:
    """The checkout's commit, with a plus sign if files differ from it; empty outside of one."""

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(root), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
