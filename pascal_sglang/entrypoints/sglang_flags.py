"""SGLang's flags, read from its source: its own parser costs twelve seconds of imports.

SGLang declares a flag as a field of a class in `srt/arg_groups/fields`, or adds it by hand in
`ServerArgs.add_cli_args`. Nothing is refused here that SGLang accepts: an unambiguous beginning of
a flag is as good as the flag, and what cannot be told is left to SGLang.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PLUGIN_GROUP = "sglang.srt.plugins"
OURS = "pascal"
# A dependency of SGLang's own. It writes its flags down as literals.
SGLANG_SERVICER = "smg_grpc_servicer"


class Flags(NamedTuple):
    """fields: the field that each option string sets. defaults: by field, where it is a literal."""

    fields: dict[str, str]
    defaults: dict[str, Any]


@cache
def known() -> Flags:
    """Every flag of the installed SGLang; empty where its source cannot be found."""
    flags = Flags({}, {})
    spec = importlib.util.find_spec("sglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        srt = Path(folder) / "srt"
        for path in sorted((srt / "arg_groups" / "fields").glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    _add_field(flags, node.target.id, node.annotation, node.value)
        for node in ast.walk(ast.parse((srt / "server_args.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                options = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
                dest = [ast.literal_eval(k.value) for k in node.keywords if k.arg == "dest"]
                field = dest[0] if dest else options[0][2:].replace("-", "_")
                flags.fields.update(dict.fromkeys(options, field))
    return flags


def _add_field(flags: Flags, name: str, annotation: ast.expr, default: ast.expr | None) -> None:
    """`name: A[type, "help" or Arg(...)] = default`; other annotations declare no flag."""
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.slice, ast.Tuple):
        return
    if getattr(annotation.value, "id", "") != "A":
        return
    said: dict[str | None, ast.expr] = {}
    for part in annotation.slice.elts[1:]:
        if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "Arg":
            said = {word.arg: word.value for word in part.keywords}
    no_cli, cli_name, aliases = (
        ast.literal_eval(said[word]) if word in said else None
        for word in ("no_cli", "cli_name", "aliases")
    )
    if no_cli:
        return
    options = [cli_name or "--" + name.replace("_", "-"), *(aliases or ())]
    if "action" in said and ast.unparse(said["action"]).endswith("BooleanOptionalAction"):
        options += ["--no-" + option[2:] for option in options]
    flags.fields.update(dict.fromkeys(options, name))
    if isinstance(default, ast.Constant):
        flags.defaults[name] = default.value


def typo(argv: Sequence[str], ours: Iterable[str]) -> str | None:
    """The first flag that no parser can know, with the closest one that is known; None without one.

    ours: option strings that are taken already.
    """
    fields = known().fields
    for name, _ in _given(argv):
        if fields and not any(option.startswith(name) for option in fields):
            if _may_be_a_plugins(name):
                return None
            return f"unknown flag {name}{did_you_mean(name, (*ours, *fields))}"
    return None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def values(argv: Sequence[str]) -> dict[str, str | None]:
    """The last value of each field that is given, None for one without a value."""
    fields = known().fields
    found: dict[str, str | None] = {}
    for name, value in _given(argv):
        exact = [name] if name in fields else [o for o in fields if o.startswith(name)]
        if len(exact) == 1:
            found[fields[exact[0]]] = value
    return found


def _given(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Flags in order with the word that may be their value, told apart as argparse does."""
    for place, word in enumerate(argv):
        if word == "--":
            return
        if not word.startswith("--") or " " in word:
            continue
        name, equals, value = word.partition("=")
        following = argv[place + 1] if place + 1 < len(argv) else "-"
        yield name, value if equals else None if following.startswith("-") else following


def _may_be_a_plugins(name: str) -> bool:
    """Whether another package that hooks into SGLang may have added a flag that begins so."""
    for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        package = entry.module.partition(".")[0]
        if entry.name == OURS:
            continue
        if package != SGLANG_SERVICER:
            return True  # It may make up its flags in any way.
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if any(name in path.read_text(errors="replace") for path in Path(folder).rglob("*.py")):
                return True
    return False
