"""Writes `dashboard.json`, the Grafana dashboard: `python -m launch.monitoring.dashboard`.

A panel is a question of `questions.py`. Import the JSON in Grafana (10 or later) and choose the
Prometheus that scrapes `/metrics`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.monitoring.questions import ROWS, Panel

OUT = Path(__file__).with_name("dashboard.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


def panels() -> Iterator[dict[str, Any]]:
    """Grafana's panels, a titled row above each group, left to right and downwards."""
    number = y = 0
    for row, group in ROWS.items():
        number += 1
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        yield {
            "id": number, "type": "row", "title": row, "gridPos": place,
            "collapsed": False, "panels": [],
        }  # fmt: skip
        y += 1
        for index, panel in enumerate(group):
            number += 1
            x = WIDTH * index % COLUMNS
            place = {"h": HEIGHT, "w": WIDTH, "x": x, "y": y + WIDTH * index // COLUMNS * HEIGHT}
            yield timeseries(panel, number, place)
        y += -(-WIDTH * len(group) // COLUMNS) * HEIGHT


def timeseries(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {
        "fillOpacity": 30 if panel.stack else 5,
        "lineWidth": 1,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
    }
    said = {"noValue": panel.none} if panel.none else {}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.read,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom, **said},
            "overrides": [],
        },
        "options": {
            "legend": {
                "displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "editorMode": "code",
                "range": True,
            }
            for index, (legend, expression) in enumerate(panel.queries.items())
        ],
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    return {
        "uid": "pascal-sglang",
        "title": "pascal_sglang: phases, pauses, waits",
        "tags": ["sglang", "pascal"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "server",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {
                        "query": "label_values(pascal:requests_total, instance)",
                        "refId": "S",
                    },
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "annotations": {"list": []},
        "panels": list(panels()),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"Write {OUT.name}.").parse_args()
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(OUT)
