"""What PromQL queries select and group by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser

Selectors = list[tuple[str, set[str]]]


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    """Every query of a Grafana dashboard, with its variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$server", ".*")


def parsed(query: str) -> tuple[Selectors, set[str]]:
    """The series that a query names, each with the labels it matches; and all labels that it
    groups by or joins on. Raises: ValueError if it is not PromQL."""
    selectors: Selectors = []
    grouped: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append((node.name, {m.name for m in node.matchers.matchers}))
        modifier = getattr(node, "modifier", None)
        if isinstance(modifier, promql_parser.AggModifier):
            grouped.update(modifier.labels)
        if isinstance(modifier, promql_parser.BinModifier) and modifier.matching is not None:
            grouped.update(modifier.matching.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    return selectors, grouped
