"""Builds what a CUDA machine without a network lacks to run SGLang: `kit.sh` calls it.

`kit.toml` names the packages. Their wheels are fetched for that machine's Python, unpacked into one
folder `site` and stripped; stand-ins take the place of what is too large to carry. `site` is then
packed into one archive, in parts of bounded size. There:

    cat site.tar.xz.* >site.tar.xz && python3 -m tarfile -e site.tar.xz site
    bash evals/gpu/check.sh --site site

The package itself comes from its checkout; the kit only has its entry points, by which SGLang finds
it. Nothing but Python and pip is needed here, and no GPU. With `--modules` CUDA's compiler is: the
modules of FlashInfer are compiled here (`prebuilt.py`), which costs minutes there.
"""

from __future__ import annotations

import argparse
import fnmatch
import lzma
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evals.options import folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PIP_TIMEOUT_S = 540
MODULES_TIMEOUT_S = 3600
MIB = 1 << 20
EXIT_FAILED = 1
ARCHIVE = "site.tar.xz"
# A tenth larger than by the usual preset, in a fifth of the time.
PRESET = 1
LARGEST = 12


class KitError(RuntimeError):
    """The kit cannot be built; the message says why."""


@dataclass(frozen=True, slots=True)
class Stripped:
    """What of a package is carried: files that match `keep` and nothing of `leave_out`."""

    requirement: str
    keep: tuple[str, ...] = ("*",)
    leave_out: tuple[str, ...] = ()

    def carries(self, name: str) -> bool:
        """name: a file in the wheel. `*` matches slashes too."""
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep)
        return kept and not any(fnmatch.fnmatchcase(name, p) for p in self.leave_out)

    @property
    def name(self) -> str:
        """As files of the package write it."""
        return self.requirement.partition("==")[0].replace("-", "_").lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """`kit.toml`. installed: version by package that a stand-in tells to be there. environment: of
    servers that run from the kit."""

    python: str
    platforms: tuple[str, ...]
    part_bytes: int
    packages: tuple[Stripped, ...]
    modules: tuple[str, ...]
    installed: dict[str, str]
    environment: dict[str, str]


def contents(path: Path = HERE / "kit.toml") -> Contents:
    told = tomllib.loads(path.read_text())
    every = tuple(told["leave_out"])
    whole = [Stripped(each, leave_out=every) for each in told["packages"].split()]
    parts = [
        Stripped(
            each["package"], tuple(each.get("keep", ("*",))), (*every, *each.get("leave_out", ()))
        )
        for each in told["stripped"]
    ]
    return Contents(
        python=told["python"],
        platforms=_platforms(told["glibc"]),
        part_bytes=told["part_mib"] * MIB,
        packages=(*whole, *parts),
        modules=tuple(told["standin"]["modules"]),
        installed=told["standin"]["installed"],
        environment=told["environment"],
    )


def _platforms(glibc: int) -> tuple[str, ...]:
    """pip's names of machines with at most glibc 2.`glibc`; pip takes each by itself alone."""
    numbered = (f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1))
    return (*numbered, *(f"manylinux{old}_x86_64" for old in ("2014", "2010", "1")))


def fetch(wanted: Contents, wheels: Path) -> None:
    """Have the wheel of every package in `wheels`. Raises: KitError with pip's last words."""
    missing = [p for p in wanted.packages if not any(wheels.glob(f"{p.name}-*.whl"))]
    if not missing:
        return
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(wheels)),
        *("--python-version", wanted.python, "--implementation", "cp"),
        *(f"--platform={platform}" for platform in wanted.platforms),
        *(package.requirement for package in missing),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise KitError(f"pip did not end within {PIP_TIMEOUT_S} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        told = "\n".join(errors) or done.stderr.strip()[-2000:]
        raise KitError(f"pip could not fetch the wheels:\n{told}")


def unpack(package: Stripped, wheels: Path, site: Path) -> int:
    """Unpack what of the package is carried; returns its bytes. Raises: KitError."""
    found = sorted(wheels.glob(f"{package.name}-*.whl"))
    if len(found) != 1:
        raise KitError(f"{len(found)} wheels of {package.requirement} in {wheels}, not one")
    size = 0
    with zipfile.ZipFile(found[0]) as wheel:
        for info in wheel.infolist():
            # What a wheel has for `site-packages`, and nothing for other folders.
            _, _, inner = info.filename.rpartition(".data/purelib/")
            _, _, inner = inner.rpartition(".data/platlib/")
            if info.is_dir() or ".data/" in inner or not package.carries(inner):
                continue
            target = site / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(info))
            size += info.file_size
    return size


def add_standins(wanted: Contents, site: Path) -> None:
    for name in wanted.modules:
        source = HERE / "standin" / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, site / name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy(source, site / name)
    for package, version in wanted.installed.items():
        _add_metadata(site, package, version)


def add_entry_points(site: Path, project: Path = ROOT / "pyproject.toml") -> None:
    """What SGLang finds our plugins by, as an installation of this checkout would write it."""
    told: dict[str, Any] = tomllib.loads(project.read_text())
    points = told["project"]["entry-points"]
    lines = []
    for group, named in points.items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in named.items()), ""]
    version = told["tool"]["hatch"]["version"]["fallback-version"]
    info = _add_metadata(site, told["project"]["name"], version)
    (info / "entry_points.txt").write_text("\n".join(lines))


def _add_metadata(site: Path, package: str, version: str) -> Path:
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    return info


class Parts:
    """A file that is written to several, each of at most `limit` bytes."""

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        self._folder, self._name, self._limit = folder, name, limit
        self._file: IO[bytes] | None = None
        self.paths: list[Path] = []

    def write(self, some: bytes) -> int:
        written = 0
        while written < len(some):
            if self._file is None or self._file.tell() == self._limit:
                self._next()
            assert self._file is not None
            room = self._limit - self._file.tell()
            written += self._file.write(some[written : written + room])
        return written

    def _next(self) -> None:
        self.close()
        # So many that their names sort like their numbers.
        self.paths.append(self._folder / f"{self._name}.{len(self.paths) + 1:02d}")
        self._file = self.paths[-1].open("wb")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def pack(site: Path, out: Path, limit: int) -> list[Path]:
    """Pack `site` into one archive, in parts of at most `limit` bytes; returns these."""
    parts = Parts(out, ARCHIVE, limit)
    files = sorted(path for path in site.rglob("*") if path.is_file())
    try:
        with (
            lzma.open(parts, "wb", preset=PRESET) as compressed,  # type: ignore[call-overload]
            tarfile.open(fileobj=compressed, mode="w|") as archive,
        ):
            for path in files:
                if "__pycache__" not in path.parts:
                    archive.add(path, str(path.relative_to(site)), filter=_without_owner)
    finally:
        parts.close()
    return parts.paths


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def build_modules(wanted: Contents, work: Path, site: Path) -> None:
    """Compile FlashInfer's modules into `site`, in `work`. Raises: KitError."""
    (version,) = (
        package.requirement.partition("==")[2]
        for package in wanted.packages
        if package.name == "flashinfer_python"
    )
    folders = ["--out", str(site / "flashinfer" / "data" / "aot"), "--work", str(work)]
    command = [sys.executable, "-m", "evals.gpu.prebuilt", *folders, "--flashinfer", version]
    try:
        subprocess.run(command, check=True, timeout=MODULES_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise KitError(f"FlashInfer's modules cannot be built here: {error}") from error


def build(wanted: Contents, out: Path, *, modules: bool = False) -> None:
    """Fetch, unpack and pack everything into `out`, and say what it takes. modules: with those of
    FlashInfer as they are compiled. Raises: KitError."""
    wheels, site = out / "wheels", out / "site"
    wheels.mkdir(parents=True, exist_ok=True)
    fetch(wanted, wheels)
    shutil.rmtree(site, ignore_errors=True)
    sizes = {package.requirement: unpack(package, wheels, site) for package in wanted.packages}
    add_standins(wanted, site)
    add_entry_points(site)
    if modules:
        build_modules(wanted, out / "modules", site)
    for requirement, size in sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]:
        print(f"{requirement:<40}{size / MIB:>8.1f} MiB")
    print(f"{f'all {len(sizes)} packages':<40}{sum(sizes.values()) / MIB:>8.1f} MiB", flush=True)
    for part in pack(site, out, wanted.part_bytes):
        print(f"{part.name:<40}{part.stat().st_size / MIB:>8.1f} MiB")
    print(f"in {out}; unpacked in {site}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evals/gpu/kit.sh", description=__doc__)
    parser.add_argument("--out", type=folder, default="build/kit", help="folder (%(default)s)")
    parser.add_argument(
        "--modules", action="store_true", help="compile FlashInfer's modules here (prebuilt.py)"
    )
    asked = parser.parse_args(argv)
    try:
        build(contents(), asked.out, modules=asked.modules)
    except (KitError, OSError, zipfile.BadZipFile) as error:
        print(f"kit.sh: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
