"""The list of SGLang symbols this package depends on, and the check that they are unchanged.

A seam is a symbol of SGLang that we subclass, override, wrap, or rely on. `patches/seams.toml`
holds each with the digest of the source it was written against, per supported SGLang version.
Digests are taken from source files without importing them, so the check costs milliseconds and
works before anything heavy is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

KINDS = ("subclass", "override", "wrap", "use")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class SeamError(RuntimeError):
    """SGLang is not what this package was written against; the message names the symbol."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol: `module:Qualified.name`, how we touch it, which of our symbols does, and why."""

    symbol: str
    how: str
    by: str
    why: str
    digests: dict[str, str]

    def __post_init__(self) -> None:
        if self.how not in KINDS:
            raise SeamError(f"{self.symbol}: how must be one of {', '.join(KINDS)}")
        if self.symbol.count(":") != 1:
            raise SeamError(f"{self.symbol}: expected module:Qualified.name")

    @property
    def module(self) -> str:
        return self.symbol.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.symbol.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one seam: `found` is today's digest, None if the symbol is gone."""

    seam: Seam
    expected: str | None
    found: str | None

    @property
    def ok(self) -> bool:
        return self.found is not None and self.found == self.expected

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "MISSING"
        if self.expected is None:
            return "NO DIGEST"
        return "ok" if self.ok else "CHANGED"


def seams_path() -> Path:
    """`patches/seams.toml`, inside an installed wheel or beside a source checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "patches", here.parent / "patches"):
        if (candidate / "seams.toml").is_file():
            return candidate / "seams.toml"
    raise SeamError("patches/seams.toml is missing from this installation")


def load_seams(path: Path | None = None) -> list[Seam]:
    """Read the seam list; raises `SeamError` on a malformed file."""
    path = path or seams_path()
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["seam"]
        return [
            Seam(e["symbol"], e["how"], e["by"], " ".join(e["why"].split()), e["digest"])
            for e in entries
        ]
    except (tomllib.TOMLDecodeError, KeyError, OSError) as error:
        raise SeamError(f"cannot read {path}: {error!r}") from error


def sglang_version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise SeamError("sglang is not installed") from error


def _package_root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SeamError(f"cannot find the source of {package}")
    return Path(spec.origin).parent


@lru_cache(maxsize=64)
def _parse(path: Path) -> tuple[list[str], ast.Module] | None:
    """The lines of a source file and its tree; None if there is no such file."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError:
        return None
    return source.split("\n"), ast.parse(source)


def source_digest(module: str, qualname: str) -> str | None:
    """First 16 hex digits of SHA-256 over the symbol's source lines; None if it does not exist."""
    package, _, rest = module.partition(".")
    base = _package_root(package).joinpath(*rest.split(".")) if rest else _package_root(package)
    parsed = _parse(base.with_suffix(".py")) or _parse(base / "__init__.py")
    if parsed is None:
        return None
    lines, tree = parsed
    node: ast.AST = tree
    for name in qualname.split("."):
        found = _child(node, name)
        if found is None:
            return None
        node = found
    assert isinstance(node, Definition)
    decorators = [ast.unparse(d) for d in node.decorator_list]
    text = "\n".join([*decorators, _segment(lines, node)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _segment(lines: list[str], node: Definition) -> str:
    """The source of a definition, as `ast.get_source_segment` gives it; that one splits the whole
    file into lines anew for every symbol, which takes seconds at every start of every process."""
    assert node.end_lineno is not None
    *before, last = lines[node.lineno - 1 : node.end_lineno]
    segment = "\n".join([*before, last.encode()[: node.end_col_offset].decode()])
    return segment.encode()[node.col_offset :].decode()


def _child(node: ast.AST, name: str) -> Definition | None:
    for child in getattr(node, "body", []):
        if isinstance(child, Definition) and child.name == name:
            return child
    return None


def check_seams(seams: list[Seam] | None = None) -> list[Finding]:
    """Compare every seam with the installed SGLang."""
    version = sglang_version()
    return [
        Finding(seam, seam.digests.get(version), source_digest(seam.module, seam.qualname))
        for seam in (load_seams() if seams is None else seams)
    ]


def verify_seams() -> None:
    """Raise `SeamError` naming the first symbol that is not what it was; return if all are."""
    for finding in check_seams():
        if finding.ok:
            continue
        symbol, version = finding.seam.symbol, sglang_version()
        if finding.expected is None:
            raise SeamError(f"sglang {version} is not supported: no digest for {symbol}")
        raise SeamError(
            f"{symbol} is {finding.verdict.lower()} in sglang {version} "
            f"(expected {finding.expected}, found {finding.found or 'nothing'})"
        )
