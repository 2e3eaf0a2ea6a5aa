"""The list of SGLang symbols this package depends on, and the check that they are unchanged.

A seam is a symbol of SGLang that we subclass, override, wrap, or rely on. `patches/seams.toml`
holds each with a digest per supported SGLang version, in two tiers: of its source where a class or
function of ours stands in its place or around it, and of its interface where we only use it.
Digests are taken from source files without importing them, so the check costs milliseconds, works
before anything heavy is loaded, and works on a release that is not installed.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

KINDS = ("subclass", "override", "wrap", "use")
# Recorded in place of a digest: that version lacks the symbol, and `older_sglang` makes up for it.
ABSENT = "absent"
# Among the fields of a seam: every attribute that the class has, so that a new one is noticed.
EVERY = "*"
# Names the one version that is served though its seams were not read.
ACCEPT_ENV = "PASCAL_SGLANG_ACCEPT"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class SeamError(RuntimeError):
    """SGLang is not what this package was written against; the message names the symbol."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol of SGLang and what we do with it."""

    # `module:Qualified.name`.
    symbol: str
    # One of `KINDS`.
    how: str
    # Our symbol that does so.
    by: str
    why: str
    # By SGLang version; `ABSENT` where it lacks the symbol.
    digests: dict[str, str]
    # Under `use`: names inside the symbol that we rely on; `EVERY` for all attributes of a class.
    fields: tuple[str, ...] = ()
    # The last SGLang version that it concerns: `older_sglang` touches it there. None: no last one.
    until: str | None = None

    def __post_init__(self) -> None:
        if self.how not in KINDS:
            raise SeamError(f"{self.symbol}: how must be one of {', '.join(KINDS)}")
        if self.symbol.count(":") != 1:
            raise SeamError(f"{self.symbol}: expected module:Qualified.name")
        if self.fields and self.by_source:
            raise SeamError(f"{self.symbol}: fields belong to a seam that we use")

    @property
    def module(self) -> str:
        return self.symbol.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.symbol.partition(":")[2]

    @property
    def by_source(self) -> bool:
        """Whether any change of its source has to be read; else a change of its interface."""
        return self.how != "use"

    def concerns(self, version: str) -> bool:
        return self.until is None or version_order(version) <= version_order(self.until)


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
            Seam(
                e["symbol"],
                e["how"],
                e["by"],
                " ".join(e["why"].split()),
                e["digest"],
                tuple(e.get("fields", ())),
                e.get("until"),
            )
            for e in entries
        ]
    except (tomllib.TOMLDecodeError, KeyError, OSError) as error:
        raise SeamError(f"cannot read {path}: {error!r}") from error


def version_order(version: str) -> tuple[tuple[int, ...], str]:
    """Sorts release numbers: 0.5.9 before 0.5.10, 0.5.10 before 0.5.10.post1."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    found = numbers.group() if numbers else ""
    return tuple(int(n) for n in found.split(".") if n), version[len(found) :]


def supported_versions(seams: Sequence[Seam]) -> list[str]:
    """The SGLang versions for which every seam is recorded, oldest first."""
    known = {version for seam in seams for version in seam.digests}
    missing = {v for v in known for s in seams if s.concerns(v) and v not in s.digests}
    return sorted(known - missing, key=version_order)


@lru_cache(maxsize=256)
def _parse(path: Path) -> tuple[list[str], ast.Module] | None:
    """The lines of a source file and its tree; None if there is no such file."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError:
        return None
    return source.split("\n"), ast.parse(source)


@dataclass(frozen=True, slots=True)
class Symbol:
    """The definition of a symbol in the source of one SGLang."""

    lines: list[str]
    node: Definition

    @property
    def source(self) -> str:
        """Its decorators and the lines of its definition."""
        decorators = [ast.unparse(d) for d in self.node.decorator_list]
        return "\n".join([*decorators, self._segment()])

    def _segment(self) -> str:
        """As `ast.get_source_segment` gives it; that one splits the whole file into lines anew for
        every symbol, which takes seconds at every start of every process."""
        node = self.node
        assert node.end_lineno is not None
        *before, last = self.lines[node.lineno - 1 : node.end_lineno]
        segment = "\n".join([*before, last.encode()[: node.end_col_offset].decode()])
        return segment.encode()[node.col_offset :].decode()

    @property
    def signature(self) -> str:
        """How it is called: the arguments with their defaults, without types."""
        if not isinstance(self.node, ast.ClassDef):
            return _signature(self.node)
        decorators = [f"@{ast.unparse(d)} " for d in self.node.decorator_list]
        bases = ", ".join(ast.unparse(base) for base in self.node.bases)
        init = _child(self.node, "__init__")
        made = f" {_signature(init)}" if init is not None else ""
        return f"{''.join(decorators)}class {self.node.name}({bases}){made}"

    def field(self, name: str) -> str | None:
        """How a name that we rely on stands in it; None if it does not."""
        if isinstance(self.node, ast.ClassDef):
            declared = _declared(self.node).get(name)
            return None if declared is None else _declaration(declared)
        return name if name in _names(self.node) else None

    def missing(self, fields: Sequence[str]) -> list[str]:
        """Which of the names are not in it."""
        return [name for name in fields if name != EVERY and self.field(name) is None]

    def interface(self, fields: Sequence[str]) -> str:
        """The signature, and how the given names stand in the symbol."""
        names = [name for name in fields if name != EVERY]
        if EVERY in fields:
            names += [name for name in self._attributes() if name not in names]
        return "\n".join([self.signature, *(f"{name}: {self.field(name)}" for name in names)])

    def _attributes(self) -> list[str]:
        """What an object of the class has beside methods."""
        assert isinstance(self.node, ast.ClassDef)
        declared = _declared(self.node).items()
        return sorted(name for name, where in declared if not isinstance(where, Definition))

    def digest(self, seam: Seam) -> str:
        """First 16 hex digits of SHA-256 over what counts for this seam."""
        return digest(self.source if seam.by_source else self.interface(seam.fields))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _signature(node: Definition) -> str:
    assert not isinstance(node, ast.ClassDef)
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{decorators}{kind} {node.name}({ast.unparse(arguments)})"


@lru_cache(maxsize=64)
def _declared(node: ast.ClassDef) -> dict[str, ast.AST]:
    """Where a class has each of its names: in its body, else where a method of it sets it."""
    found: dict[str, ast.AST] = {}
    for child in node.body:
        if isinstance(child, Definition):
            found.setdefault(child.name, child)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.setdefault(child.target.id, child)
        elif isinstance(child, ast.Assign):
            for target in child.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, child)
    for below in ast.walk(node):  # An annotated target comes before the same without.
        name = _set_by_method(below.target if isinstance(below, ast.AnnAssign) else below)
        if name is not None:
            found.setdefault(name, below)
    return found


def _set_by_method(target: ast.AST) -> str | None:
    """`name` for `self.name`, being set."""
    if not isinstance(target, ast.Attribute) or not isinstance(target.ctx, ast.Store):
        return None
    owner = target.value
    return target.attr if isinstance(owner, ast.Name) and owner.id == "self" else None


def _declaration(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if isinstance(node, Definition):
        return _signature(node)
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
        return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}"
    return ast.unparse(node)


@lru_cache(maxsize=64)
def _names(node: ast.AST) -> set[str]:
    """Every name that a function mentions."""
    found: set[str] = set()
    for child in ast.walk(node):
        for attribute in ("id", "attr", "arg", "value"):
            value = getattr(child, attribute, None)
            if isinstance(value, str):
                found.add(value)
    return found


def _child(node: ast.AST, name: str) -> Definition | None:
    for child in getattr(node, "body", []):
        if isinstance(child, Definition) and child.name == name:
            return child
    return None


@dataclass(frozen=True, slots=True)
class SourceTree:
    """The source files of one SGLang, installed or not."""

    # The folder that has the package `sglang` in it.
    folder: Path
    version: str

    def find(self, seam: Seam) -> Symbol | None:
        """The symbol of a seam; None if it does not exist."""
        base = self.folder.joinpath(*seam.module.split("."))
        parsed = _parse(base.with_suffix(".py")) or _parse(base / "__init__.py")
        if parsed is None:
            return None
        lines, node = parsed[0], parsed[1]
        found: ast.AST | None = node
        for name in seam.qualname.split("."):
            found = None if found is None else _child(found, name)
        if found is None:
            return None
        assert isinstance(found, Definition)
        return Symbol(lines, found)


def installed() -> SourceTree:
    """The SGLang that this process would import; raises `SeamError` without one."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise SeamError("sglang is not installed") from error
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise SeamError("cannot find the source of sglang")
    return SourceTree(Path(spec.origin).parents[1], version)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one seam."""

    seam: Seam
    # What is recorded for the version at hand; None if nothing is.
    expected: str | None
    # The symbol there; None if it does not exist.
    symbol: Symbol | None

    @property
    def found(self) -> str:
        """What would be recorded."""
        return ABSENT if self.symbol is None else self.symbol.digest(self.seam)

    @property
    def ok(self) -> bool:
        """Whether the symbol is what was read. The digest of its source is good for a seam of
        either tier: where that is the same, so is the interface."""
        if self.expected == self.found:
            return True
        return self.symbol is not None and self.expected == digest(self.symbol.source)

    @property
    def verdict(self) -> str:
        if self.ok:
            return "ok" if self.symbol is not None else ABSENT
        if self.symbol is None:
            return "MISSING"
        return "NOT RECORDED" if self.expected is None else "CHANGED"


def check_seams(seams: list[Seam] | None = None, tree: SourceTree | None = None) -> list[Finding]:
    """Compare every seam that concerns an SGLang with it: with the installed one unless told."""
    tree = tree or installed()
    return [
        Finding(seam, seam.digests.get(tree.version), tree.find(seam))
        for seam in (load_seams() if seams is None else seams)
        if seam.concerns(tree.version)
    ]


def verify_seams() -> str | None:
    """Raise `SeamError` naming the first symbol that is not what it was; return if all are, with a
    warning for a version that was accepted unread."""
    tree, seams = installed(), load_seams()
    findings = check_seams(seams, tree)
    unread = [f for f in findings if f.expected is None]
    if unread:
        return _accept(tree.version, seams, unread, findings)
    for finding in findings:
        if finding.ok:
            continue
        seam, symbol = finding.seam, finding.symbol
        if symbol is not None and (gone := symbol.missing(seam.fields)):
            raise SeamError(f"{seam.symbol} has no {gone[0]} in sglang {tree.version}")
        raise SeamError(
            f"{seam.symbol} is {finding.verdict.lower()} in sglang {tree.version} "
            f"(expected {finding.expected}, found {finding.found})"
        )
    return None


def _accept(
    version: str, seams: Sequence[Seam], unread: Sequence[Finding], findings: Sequence[Finding]
) -> str:
    supported = supported_versions(seams)
    if os.environ.get(ACCEPT_ENV) != version:
        raise SeamError(
            f"sglang {version} is not supported: {len(unread)} of {len(seams)} seams were not read "
            f"for it, {unread[0].seam.symbol} the first; supported are "
            f"{', '.join(supported) or 'none'}, and {ACCEPT_ENV}={version} serves all the same"
        )
    newest = supported[-1] if supported else ""
    for finding in findings:
        seam, symbol = finding.seam, finding.symbol
        if symbol is None and seam.digests.get(newest) != ABSENT:
            raise SeamError(f"{seam.symbol} is missing in sglang {version}")
        if symbol is not None and (gone := symbol.missing(seam.fields)):
            raise SeamError(f"{seam.symbol} has no {gone[0]} in sglang {version}")
    return f"sglang {version} was accepted unread by {ACCEPT_ENV}: tokens may be lost in silence"
