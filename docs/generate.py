"""Writes the generated parts of the documentation: `python docs/generate.py`.

A part lies between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. A test
regenerates all of them and fails on a difference.
"""

from __future__ import annotations

import argparse
import inspect
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
    from pascal_sglang.config import CHANGEABLE, add_flags

    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    rows = []
    for action in parser._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        names = names[:-1] + choices + "`" if choices else names
        text, marked, _ = (action.help or "").partition(CHANGEABLE)
        rows.append((names, _default(action.default), "yes" if marked else "no", _help(text)))
    return _table(("flag", "default", "may change", "meaning"), rows)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _help(text: str) -> str:
    """What `--help` says, without the default that has a column of its own."""
    return re.sub(r" \((default: )?%\(default\)s\)$", "", text).replace("|", "\\|")


def metrics() -> str:
    """The `pascal:` series, from the classes that make them."""
    from prometheus_client import REGISTRY

    from pascal_sglang.cluster.metrics import ControllerMetrics, FrontendMetrics
    from pascal_sglang.engine.observability.metrics import (
        DecisionMetrics,
        ForecastMetrics,
        PhaseMetrics,
        SupportMetrics,
        ToolMetrics,
    )
    from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
    from pascal_sglang.support import EVERYTHING

    before = set(REGISTRY._collector_to_names)
    labels = {"model_name": ""}
    SupportMetrics(labels, EVERYTHING)
    PhaseMetrics(labels, 0.95)
    DecisionMetrics(labels, 1.0, 0)
    ForecastMetrics(labels)
    ToolMetrics(labels, (), 0)
    MigrationMetrics(labels)
    ControllerMetrics("")
    FrontendMetrics("")
    rows = []
    series: Any
    for series in (s for s in REGISTRY._collector_to_names if s not in before):
        own = [name for name in series._labelnames if name not in labels]
        name = series._name + SERIES[series._type]
        shown = f"`{name}{{{','.join(own)}}}`" if own else f"`{name}`"
        rows.append((shown, series._documentation))
    return _table(("series", "meaning"), rows)


def levels() -> str:
    """What each level means, as the enumeration's comments say it."""
    from pascal_sglang import support

    source = inspect.getsource(support.Level)
    said = re.findall(r"^    ([A-Z]+) = (\d)  # (.*)$", source, re.MULTILINE)
    return _table(
        ("level", "`pascal:support_level`", "what is done"),
        ((f"`{name.lower()}`", number, meaning) for name, number, meaning in said),
    )


def support() -> str:
    """The features and kinds of requests that get less than everything."""
    from pascal_sglang import support as table

    found: list[tuple[str, ...]] = []
    ours = (*table.CONFIG, *table.MIGRATION)
    server = (*ours, *table.SERVER, *table.POOLS, *table.COPIES, *table.INSTANCES)
    requests = (*table.REQUESTS, *table.DRAFTED)
    for what, rows in (("a server with", server), ("a request with", requests)):
        for row in rows:
            level = f"`{row.level}`" if row.recomputes else f"`{row.level}`, without recomputing"
            found.append((f"{what} {_named(row.name)}", level, row.why))
    return _table(("", "level", "why no higher one"), found)


def tool_kv() -> str:
    """The features with which no KV is kept for conversations that wait for a tool."""
    from pascal_sglang import support as table

    return _table(("feature", "why"), ((_named(row.name), row.why) for row in table.TOOL_KV))


def families() -> str:
    """Model families, the pool that each uses, and the level that it leaves."""
    from pascal_sglang import support as table

    pools = {row.name: row for row in (*table.POOLS, *table.COPIES)}
    found = []
    for family in table.FAMILIES:
        level = min((pools[name].level for name in family.rows), default=table.Level.MOVE)
        found.append((family.names, family.pool, f"`{level}`"))
    return _table(("models", "KV pool", "level"), found)


def settings() -> str:
    """SGLang's flags and environment variables that bear on scheduling."""
    from pascal_sglang.scheduling_flags import SETTINGS, Effect
    from pascal_sglang.support import Level

    found = []
    for setting in SETTINGS:
        effect = setting.effect.value
        if setting.effect is Effect.OVERRIDDEN and setting.since > Level.ORDER:
            effect += f" from `{setting.since}` on"
        test = f"`{setting.test}`" if setting.test else ""
        names = ", ".join(f"`{name}`" for name in setting.names)
        found.append((names, effect, _named(setting.how), test))
    return _table(("SGLang's setting", "under a policy that schedules", "how", "test"), found)


def _named(name: str) -> str:
    """A feature's name with its flag, or its variable, as code."""
    return re.sub(r"(--[a-z-]+|SGLANG_[A-Z_]+)", r"`\1`", name)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


PARTS = {
    "serving.md": {"flags": flags},
    "observability.md": {"metrics": metrics},
    "compatibility.md": {
        "levels": levels,
        "support": support,
        "tool_kv": tool_kv,
        "families": families,
        "settings": settings,
    },
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
