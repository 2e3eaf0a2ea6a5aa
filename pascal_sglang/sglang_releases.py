"""Releases of SGLang beside the installed one: their files, what changed between two of them, and
an environment in which one of them stands in place of the installed one.

`python -m pascal_sglang.sglang_releases VERSION` prints the Python of such an environment.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pascal_sglang.demo.smollm2 import DemoModelError, default_cache_dir
from pascal_sglang.seams import (
    ABSENT,
    Seam,
    SeamError,
    SourceTree,
    Symbol,
    check_seams,
    installed,
    load_seams,
    version_order,
)

DOWNLOAD_TIMEOUT_S = 600
FILES, ENVIRONMENT = "files", "venv"


def _folder(version: str) -> Path:
    if not re.fullmatch(r"\d+(\.\w+)*", version):
        raise SeamError(f"{version!r} is no version of SGLang")
    try:
        return default_cache_dir().absolute() / "sglang" / version
    except DemoModelError as error:
        raise SeamError(str(error)) from error


def release(version: str) -> SourceTree:
    """The files of a release: the installed one, or those of its wheel, which is downloaded alone
    on first use. Raises `SeamError` with one line where that fails."""
    here = installed()
    if version == here.version:
        return here
    files = _folder(version) / FILES
    if not files.is_dir():
        try:
            files.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=files.parent, prefix="loading-") as work:
                wheel = _download(version, Path(work))
                unpacked = Path(work) / FILES
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(unpacked)
                if not files.is_dir():  # Another process may have been sooner.
                    unpacked.rename(files)
        except (OSError, zipfile.BadZipFile) as error:
            raise SeamError(f"cannot unpack sglang {version}: {error}") from error
    return SourceTree(files, version)


def _download(version: str, folder: Path) -> Path:
    """The wheel of a release, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    try:
        result = subprocess.run(
            [*command, f"sglang=={version}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SeamError(
            f"cannot download sglang {version}: pip took more than {DOWNLOAD_TIMEOUT_S} s"
        ) from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["pip failed"]
        said = [line for line in lines if line.startswith("ERROR")] or lines
        raise SeamError(f"cannot download sglang {version}: {said[-1]}")
    return next(folder.glob("*.whl"))


def environment(version: str) -> Path:
    """The Python of an environment like this one, but with that release's files before the
    installed ones. Its dependencies stay those of the installed release."""
    tree = release(version)
    if tree == installed():
        return Path(sys.executable)
    folder = _folder(version) / ENVIRONMENT
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    site = {"base": str(folder), "platbase": str(folder)}
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_default_scheme()
    packages = Path(sysconfig.get_path("purelib", scheme, site))
    # What is installed may be found through files of its own, as this package is when editable.
    below = [f"import site; site.addsitedir({path!r})" for path in _site_packages()]
    here = Path(__file__).resolve().parents[1]
    checkout = [str(here)] if (here / "pyproject.toml").is_file() else []
    text = "\n".join([*checkout, str(tree.folder), *below]) + "\n"
    (packages / "another_sglang.pth").write_text(text)
    return folder / "bin" / "python"


def _site_packages() -> list[str]:
    names = ("purelib", "platlib")
    return list(dict.fromkeys(sysconfig.get_path(name) for name in names))


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one seam between two releases."""

    seam: Seam
    old: Symbol | None
    new: Symbol | None
    # Whether the new release's digest is recorded, and so was read.
    recorded: bool

    @property
    def verdict(self) -> str:
        old, new = self.old, self.new
        if new is None:
            return "gone" if old is not None else ABSENT
        if old is None:
            return "new"
        if old.signature != new.signature:
            return "signature changed"
        if old.interface(self.seam.fields) != new.interface(self.seam.fields):
            return "fields changed"
        return "unchanged" if old.source == new.source else "body changed"

    @property
    def concerns_us(self) -> bool:
        """Whether it has to be read, by the tier of the seam."""
        verdict = self.verdict
        if verdict == "body changed":
            return self.seam.by_source
        return verdict not in ("unchanged", ABSENT)

    @property
    def to_reread(self) -> bool:
        return self.concerns_us and not self.recorded

    def diff(self, old: str, new: str) -> Iterator[str]:
        """A unified diff of the two sources; `old` and `new` name the releases."""
        before = [] if self.old is None else self.old.source.split("\n")
        after = [] if self.new is None else self.new.source.split("\n")
        yield from difflib.unified_diff(
            before, after, f"{old} {self.seam.symbol}", f"{new} {self.seam.symbol}", lineterm=""
        )


def compare(seams: list[Seam], old: SourceTree, new: SourceTree) -> list[Change]:
    """What became of every seam between two releases."""
    return [
        Change(f.seam, old.find(f.seam), f.symbol, f.ok and f.expected is not None)
        for f in check_seams(seams, new)
    ]


def report(changes: Sequence[Change], old: str, new: str, diff: bool = False) -> Iterator[str]:
    """The lines of a comparison: what has to be read, then the rest."""
    worst = ("gone", "new", "signature changed", "fields changed", "body changed")
    rank = {verdict: n for n, verdict in enumerate(worst)}
    order = sorted(
        changes, key=lambda c: (not c.to_reread, not c.concerns_us, rank.get(c.verdict, len(rank)))
    )
    seen = set()
    for change in order:
        note = "REREAD" if change.to_reread else "read" if change.concerns_us else ""
        seam = change.seam
        yield f"{note:<6} {change.verdict:<17} {seam.how:<9} {seam.symbol}  {seam.by}"
        if diff and change.verdict not in ("unchanged", ABSENT) and seam.symbol not in seen:
            seen.add(seam.symbol)
            yield from change.diff(old, new)
    changed = sum(c.verdict not in ("unchanged", ABSENT) for c in changes)
    concern = sum(c.concerns_us for c in changes)
    reread = sum(c.to_reread for c in changes)
    yield (
        f"sglang {old} -> {new}: {len(changes)} seams, {changed} changed at all, "
        f"{concern} in what we rely on, {reread} to read again"
    )


DIGESTS = re.compile(r"^digest = \{.*\}$", re.MULTILINE)


def record(path: Path, tree: SourceTree) -> int:
    """Write the digests of a release into the seam list, which says that every seam was read for
    it; returns how many there are."""
    seams = load_seams(path)
    found = {id(f.seam): f.found for f in check_seams(seams, tree)}
    given = iter(seams)

    def line(_: re.Match[str]) -> str:
        seam = next(given)
        digests = dict(seam.digests)
        if id(seam) in found:
            digests[tree.version] = found[id(seam)]
        ordered = sorted(digests, key=version_order)
        return "digest = { " + ", ".join(f'"{v}" = "{digests[v]}"' for v in ordered) + " }"

    text = path.read_text(encoding="utf-8")
    if len(DIGESTS.findall(text)) != len(seams):
        raise SeamError(f"{path}: every seam needs its digests on one line")
    path.write_text(DIGESTS.sub(line, text), encoding="utf-8")
    return len(found)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m pascal_sglang.sglang_releases VERSION", file=sys.stderr)
        return 2
    try:
        print(environment(argv[0]))
    except (SeamError, OSError) as error:
        print(f"pascal_sglang: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
