"""Makes an older SGLang look like the newest one that this package knows.

The rest of the package is written against the newest release alone. A step brings a release to the
next one, as far as we touch it: names that are new there, and calls of them where SGLang calls
them from then on. A step changes nothing of what SGLang does. A release that is given up takes its
step along; one that is adopted may bring one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from pascal_sglang.older_sglang import to_0_5_22, to_0_5_23
from pascal_sglang.seams import installed, version_order

# Module of SGLang -> what to do with it.
Parts = Mapping[str, Callable[[Any], None]]
# The release that a step leads to, oldest first.
STEPS: tuple[tuple[str, Parts], ...] = (
    ("0.5.22", to_0_5_22.PARTS),
    ("0.5.23", to_0_5_23.PARTS),
)
# Attribute of a module of SGLang: the steps that it has taken. It is kept there, because a process
# may be a fork in which this package is another one.
TAKEN = "_pascal_steps"
# Whoever needs it imports it, once our controller stands in the place of its base, and asks again.
LATE = "sglang.srt.ray.data_parallel_controller"


def install(*, everywhere: bool = False, with_ray: bool = False) -> None:
    """Bring the installed SGLang up to the newest release. In modules that are imported already,
    unless `everywhere`."""
    version = version_order(installed().version)
    for target, parts in STEPS:
        if version >= version_order(target):
            continue
        for name, change in parts.items():
            if everywhere and (with_ray or not name.startswith("sglang.srt.ray")) and name != LATE:
                importlib.import_module(name)
            module = sys.modules.get(name)
            if module is None or _is_being_imported(module):
                continue
            taken: set[str] = vars(module).setdefault(TAKEN, set())
            if target not in taken:
                taken.add(target)
                change(module)


def _is_being_imported(module: ModuleType) -> bool:
    """SGLang asks for its platform in the middle of its own imports."""
    return bool(getattr(module.__spec__, "_initializing", False))
