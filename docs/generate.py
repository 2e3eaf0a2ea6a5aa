"""Writes the generated parts of the documentation: `python docs/generate.py`.

A part lies between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. A test
regenerates all of them and fails on a difference.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

SERIES = {"counter": "_total", "gauge": "", "histogram": ""}


def flags() -> str:
    """The `--pascal-*` flags, from the parser itself."""
    from pascal_sglang.config import add_flags

    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    rows = []
    for action in parser._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        names = names[:-1] + choices + "`" if choices else names
        default = _default(action.default)
        rows.append((names, default, _help(action)))
    return _table(("flag", "default", "meaning"), rows)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _help(action: argparse.Action) -> str:
    """What `--help` says, without the default that has a column of its own."""
    text = re.sub(r" \((default: )?%\(default\)s\)$", "", action.help or "")
    return text.replace("|", "\\|")


def metrics() -> str:
    """The `pascal:` series, from the classes that make them."""
    from prometheus_client import REGISTRY

    from pascal_sglang.cluster.metrics import ControllerMetrics
    from pascal_sglang.engine.observability.metrics import DecisionMetrics, PhaseMetrics
    from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics

    before = set(REGISTRY._collector_to_names)
    labels = {"model_name": ""}
    PhaseMetrics(labels, 0.95)
    DecisionMetrics(labels, 1.0)
    MigrationMetrics(labels)
    ControllerMetrics("")
    rows = []
    series: Any
    for series in (s for s in REGISTRY._collector_to_names if s not in before):
        own = [name for name in series._labelnames if name not in labels]
        name = series._name + SERIES[series._type]
        shown = f"`{name}{{{','.join(own)}}}`" if own else f"`{name}`"
        rows.append((shown, series._documentation))
    return _table(("series", "meaning"), rows)


LEVELS = {
    "OBSERVE": "only under `fcfs`; another policy is refused at start",
    "ORDER": "our order; not paused, does not migrate",
    "RECOMPUTE": "pauses recompute; does not migrate",
    "PAUSE": "pauses keep KV; does not migrate",
}


def support() -> str:
    """The features and kinds of requests that get less than everything."""
    from pascal_sglang import support as table

    server = (*table.SERVER, *table.POOLS, *table.INSTANCES)
    found: list[tuple[str, ...]] = []
    replaced = "no effect; the policy's own order stands"
    for row in table.REPLACED:
        found.append((f"a server with `{row.name}`", replaced))
    for what, rows in (("a server with", server), ("a request with", table.REQUESTS)):
        for row in rows:
            name = f"`{row.name}`" if row.name.startswith(("--", "SGLANG_")) else row.name
            level = LEVELS[row.level.name]
            if not row.recomputes:
                level = level.replace("pauses keep KV", "pauses keep KV, none recomputes")
            found.append((f"{what} {name}", level))
    return _table(("", "under a policy that schedules"), found)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


PARTS = {
    "serving.md": {"flags": flags},
    "observability.md": {"metrics": metrics},
    "compatibility.md": {"support": support},
}


def regenerated(name: str) -> str:
    """The text of a page with its generated parts made anew."""
    text = (DOCS / name).read_text()
    for part, make in PARTS[name].items():
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        (DOCS / page).write_text(regenerated(page))
