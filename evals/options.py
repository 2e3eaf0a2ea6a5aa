"""Types of command-line options; argparse turns what they raise into its own message."""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import urlsplit


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def out_file(text: str) -> Path:
    """A file to be written at the end of a run; its folder is made now, not then."""
    path = Path(text)
    folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: a folder, not a file")
    return path


def folder(text: str) -> Path:
    """A folder, which is made if need be."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error
    return path


def base_url(text: str) -> str:
    """Where a server is; `/v1` at its end, as OpenAI's clients want it, is left out."""
    url = text.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise argparse.ArgumentTypeError(f"not http://HOST:PORT: {text!r}")
    return url
