"""A function of SGLang with a part of its source replaced.

The seam list pins the source of such a function per release, so a text is found in it or the
server refuses to start.
"""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from typing import Any

# Attribute of a patched function: its source, which a later step may patch again.
PATCHED = "_pascal_source"


def patch(owner: Any, name: str, *hunks: tuple[str, str], named: str | None = None) -> None:
    """Put a function in the place of `owner.name` that differs by `hunks`: a text of its source,
    and what stands there from now on. `named`: where a hunk gives it another name.

    Raises: LookupError for a text that is not in it.
    """
    function = getattr(owner, name)
    before = getattr(function, PATCHED, None)
    lines, first = (before, 1) if before else inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    for old, new in hunks:
        if old not in source:
            raise LookupError(f"{function.__module__}: {name} has no {old!r}")
        source = source.replace(old, new)
    file = inspect.getsourcefile(function) or "<sglang>"
    flags = __future__.annotations.compiler_flag
    code = compile("\n" * (first - 1) + source, file, "exec", flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, vars(sys.modules[function.__module__]), made)
    patched = made[named or name]
    setattr(patched, PATCHED, [source])
    setattr(owner, named or name, patched)
