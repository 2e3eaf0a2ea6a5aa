"""Which device this is, in the words of its driver and the installed packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
PACKAGES = ("sglang", "torch", "flashinfer-python", "triton", "sglang-kernel")
CPU_INFO = Path("/proc/cpuinfo")
FREE = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
# Left to everything else on the host.
CPU_SHARE = 0.8


def kind() -> str:
    """`cuda` where a driver shows a GPU, else `cpu`."""
    return "cuda" if _gpu() else "cpu"


def describe(kind: str) -> dict[str, str]:
    """The device's name and the versions of what runs on it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": (_gpu() if kind == "cuda" else None) or _cpu(), **versions}


def memory_gib(kind: str) -> float:
    """What servers may take of the first GPU's memory, or of a CPU's; 0 if that is not told."""
    if kind == "cpu":
        return CPU_SHARE * float(psutil.virtual_memory().available) / 2**30
    told = _ask(FREE)
    return float(told) / 2**10 if told else 0.0


def _gpu() -> str | None:
    return _ask(QUERY)


def _ask(query: Sequence[str]) -> str | None:
    """What the driver says of the first GPU; None without one."""
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = told.stdout.strip().splitlines()
    return lines[0] if lines else None


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{cores} cores of {models[0] if models else platform.machine()}"
