"""Which device this is, in the words of its driver and the installed packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
PACKAGES = ("sglang", "torch", "flashinfer-python", "triton", "sglang-kernel")
CPU_INFO = Path("/proc/cpuinfo")


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


def _gpu() -> str | None:
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = told.stdout.strip().splitlines()
    return names[0] if names else None


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{cores} cores of {models[0] if models else platform.machine()}"
