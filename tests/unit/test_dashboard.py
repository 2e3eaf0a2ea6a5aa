"""The Grafana dashboard: up to date, what Grafana's schema knows, and all of its PromQL parses."""

import json
from pathlib import Path

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from launch.monitoring import dashboard
from tests.promql import parsed, queries

ROOT = Path(__file__).parents[2]


def written():
    return json.loads(dashboard.OUT.read_text())


def lost(given, kept, path=""):
    """Where `kept` differs from `given`: what a schema does not know is not kept."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key, "nothing"), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}/{i}")
    elif given != kept:
        yield f"{path}: {given!r} became {kept!r}"


def through_the_schema(document):
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(document)))


def test_the_file_is_what_the_questions_make():
    assert written() == dashboard.dashboard(), "run python -m launch.monitoring.dashboard"


def test_grafanas_schema_knows_all_of_it():
    assert list(lost(written(), through_the_schema(written()))) == []


def test_the_schema_would_find_a_mistake():
    wrong = written()
    wrong["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    assert list(lost(wrong, through_the_schema(wrong)))


def test_every_panel_asks_says_how_to_read_it_and_queries():
    panels = [p for p in written()["panels"] if p["type"] != "row"]
    assert len(panels) > 20
    for panel in panels:
        assert panel["title"].endswith("?")
        assert panel["description"].endswith(".")
        assert panel["targets"]
    places = [tuple(p["gridPos"].values()) for p in written()["panels"]]
    assert len(set(places)) == len(places)
    assert len({p["id"] for p in written()["panels"]}) == len(places)


def test_every_query_parses_and_asks_for_this_server_only():
    found = [parsed(q) for q in queries(written())]
    assert len(found) > 30
    for selectors, _ in found:
        for _, matched in selectors:
            assert "instance" in matched


def test_a_query_that_does_not_parse_is_found():
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum by (le (rate(x[1m]))")
