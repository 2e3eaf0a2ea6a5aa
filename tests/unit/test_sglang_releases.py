"""Comparing another release of SGLang, without installing it and without a network: wheels made of
the installed files, which pip finds in a folder."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile

import pytest

from pascal_sglang import plugin, seams, sglang_releases
from pascal_sglang.seams import SeamError, installed, load_seams, supported_versions
from pascal_sglang.sglang_releases import environment, release

OTHER = "9.9.9"
# What changes in that release: in a file of SGLang, a text becomes another.
CHANGES = [
    # A body: of a seam that we override, of one that we wrap, of one that we use.
    ("srt/managers/scheduler.py", "def run_event_loop(self) -> None:\n", "{0}        pass\n"),
    ("srt/managers/detokenizer_manager.py", "def event_loop(self):\n", "{0}        pass\n"),
    ("srt/managers/overlap_utils.py", "self._maybe_init_forward_bufs(payload)", "{0}; x = 1"),
    # A signature, a field, a symbol.
    ("srt/mem_cache/common.py", "def release_kv_cache(req: Req,", "{0} more,"),
    ("srt/utils/watchdog.py", "self._names", "self._labels"),
    ("srt/managers/load_snapshot.py", "def shm_path_for(", "def path_for("),
]
EXPECTED = {
    "Scheduler.run_event_loop": ("REREAD", "body changed"),
    "DetokenizerManager.event_loop": ("REREAD", "body changed"),
    "FutureMap.stash": ("body", "changed"),
    "release_kv_cache": ("REREAD", "signature changed"),
    "SubprocessWatchdog": ("REREAD", "fields changed"),
    "shm_path_for": ("REREAD", "gone"),
    "Req": ("unchanged", ""),
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with a wheel of that release: the installed files that the seams are in, changed."""
    folder = tmp_path_factory.mktemp("wheels")
    files = {"sglang/__init__.py": ""}
    for seam in load_seams():
        module = seam.module.replace(".", "/")
        for path in (f"{module}.py", f"{module}/__init__.py"):
            if (source := installed().folder / path).is_file():
                files[path] = source.read_text()
    for name, old, new in CHANGES:
        path = f"sglang/{name}"
        assert old in files[path]
        files[path] = files[path].replace(old, new.format(old))
    info = f"sglang-{OTHER}.dist-info"
    pins = f"torch==0.1\nRequires-Dist: pytest[x]=={pytest.__version__}\n"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: sglang\nVersion: {OTHER}\nRequires-Dist: {pins}"
        'Requires-Dist: ruff==0.1; extra == "dev"\n'
    )
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files)
    with zipfile.ZipFile(folder / f"sglang-{OTHER}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def offline(wheels, cache, tmp_path, monkeypatch):
    """pip looks there and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PASCAL_SGLANG_CACHE", str(cache))
    return tmp_path


def rows(out):
    """Symbol -> the words before it."""
    found = {}
    for line in out.splitlines():
        words = line.split()
        symbols = [word for word in words if word.startswith("sglang.") and ":" in word]
        if symbols and not line.startswith(("+", "-")):
            found.setdefault(symbols[0].partition(":")[2], words)
    return found


def test_another_release_is_compared(offline, capsys):
    assert plugin.main(["check", "--against", OTHER]) == 1
    out = capsys.readouterr().out
    found = rows(out)
    for symbol, (note, verdict) in EXPECTED.items():
        assert " ".join(found[symbol]).startswith(f"{note} {verdict}".strip()), found[symbol]
    to_reread = {symbol for symbol, words in found.items() if words[0] == "REREAD"}
    assert to_reread == {symbol for symbol, (note, _) in EXPECTED.items() if note == "REREAD"}
    first = [words[0] for words in found.values()]
    assert first[: len(to_reread)] == ["REREAD"] * len(to_reread)
    assert set(found) == {s.qualname for s in load_seams() if s.concerns(OTHER)}
    assert "6 changed at all, 5 in what we rely on, 5 to read again" in out
    (gone,) = (line for line in out.splitlines() if line.startswith("names that we use"))
    assert "CpuDeviceMixin" in gone.replace(",", "").split()


def test_its_differences_are_shown(offline, capsys):
    assert plugin.main(["check", "--against", OTHER, "--diff"]) == 1
    out = capsys.readouterr().out
    assert "+    def run_event_loop" not in out
    assert "+        self._maybe_init_forward_bufs(payload); x = 1" in out
    assert "-        self._names" in out
    assert f"+++ {OTHER} sglang.srt.managers.load_snapshot:shm_path_for" in out


def test_once_recorded_nothing_is_left_to_read(offline, capsys, monkeypatch):
    original = seams.seams_path().read_text()
    copy = shutil.copy(seams.seams_path(), offline / "seams.toml")
    before = load_seams()
    for module in (seams, plugin):
        monkeypatch.setattr(module, "seams_path", lambda: offline / "seams.toml")
    assert plugin.main(["check", "--against", OTHER, "--record"]) == 0
    capsys.readouterr()
    assert plugin.main(["check", "--against", OTHER]) == 0
    assert "5 in what we rely on, 0 to read again" in capsys.readouterr().out
    after = load_seams(offline / "seams.toml")
    assert OTHER in supported_versions(after)
    for old, new in zip(before, after, strict=True):
        assert {v: d for v, d in new.digests.items() if v != OTHER} == old.digests
        assert (OTHER in new.digests) is new.concerns(OTHER)
    assert next(s for s in after if s.qualname == "shm_path_for").digests[OTHER] == "absent"
    # Nothing but digests has changed, and recording again changes nothing.
    without = sglang_releases.DIGESTS.sub
    assert without("", original) == without("", copy.read_text())
    digest = hashlib.sha256(copy.read_bytes()).digest()
    assert plugin.main(["check", "--against", OTHER, "--record"]) == 0
    assert hashlib.sha256(copy.read_bytes()).digest() == digest


def test_the_installed_release_is_recorded_as_it_is(tmp_path, monkeypatch, capsys):
    copy = shutil.copy(seams.seams_path(), tmp_path / "seams.toml")
    before = copy.read_text()
    version = installed().version
    victim = next(s for s in load_seams() if s.by_source).digests[version]
    copy.write_text(before.replace(f'"{version}" = "{victim}"', f'"{version}" = "{"0" * 16}"'))
    for module in (seams, plugin):
        monkeypatch.setattr(module, "seams_path", lambda: copy)
    assert plugin.main(["check"]) == 1
    assert plugin.main(["check", "--record"]) == 0
    assert plugin.main(["check"]) == 0
    assert victim in copy.read_text()


def test_the_seam_list_is_as_it_would_be_recorded(tmp_path):
    """So that recording another release touches nothing else."""
    copy = shutil.copy(seams.seams_path(), tmp_path / "seams.toml")
    sglang_releases.record(copy, installed())
    assert copy.read_text() == seams.seams_path().read_text()


def test_a_release_is_downloaded_once(offline, monkeypatch):
    monkeypatch.setenv("PASCAL_SGLANG_CACHE", str(offline / "cache"))
    files = release(OTHER).folder
    assert (files / "sglang/srt/managers/scheduler.py").is_file()
    assert [path.name for path in files.parent.iterdir()] == ["files"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(offline))
    assert release(OTHER).folder == files


@pytest.mark.parametrize(
    ("version", "says"), [("9.9.8", "cannot download sglang 9.9.8"), ("../x", "no version")]
)
def test_a_release_that_does_not_exist_is_one_line(offline, capsys, version, says):
    assert plugin.main(["check", "--against", version]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    with pytest.raises(SeamError):
        release(version)


def test_an_environment_has_that_release_in_place_of_the_installed_one(offline):
    python = environment(OTHER)
    code = (
        "import importlib.metadata as m, importlib.util as u, pytest; "
        "print(m.version('sglang'), u.find_spec('sglang').origin, m.version('torch')); "
        "print([e.value for e in m.entry_points(group='sglang.srt.plugins')], "
        "u.find_spec('pascal_sglang').origin)"
    )
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=offline)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert first.startswith(f"{OTHER} {release(OTHER).folder}/sglang/__init__.py 2.")
    assert "pascal_sglang.plugin:activate" in second
    assert second.endswith(plugin.__file__.replace("plugin.py", "__init__.py"))


def test_dependencies_that_differ_are_named(offline, capsys):
    assert sglang_releases.main([OTHER]) == 0
    out, error = capsys.readouterr()
    assert out == f"{environment(OTHER)}\n"
    version = importlib.metadata.version("torch")
    assert error.endswith(f"wants other dependencies than it gets: torch 0.1 (here {version})\n")
    assert sglang_releases.other_pins(installed()) == []


def test_that_of_the_installed_release_is_this_one():
    assert str(environment(installed().version)) == sys.executable
