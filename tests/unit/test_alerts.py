"""The rules for Prometheus: each alert fires when it should, and names series that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.promql import parsed

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "launch" / "monitoring"
CASES = Path(__file__).with_name("alerts_test.yml")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: Debian's package prometheus has it"
)


def rules():
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments):
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration():
    promtool("check", "config", MONITORING / "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise():
    promtool("test", "rules", CASES)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    fires, quiet = set(), set()
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case.get("exp_alerts") else quiet).add(case["alertname"])
    assert fires == alerts
    assert quiet == alerts


def test_rules_name_series_and_labels_that_exist():
    page = (ROOT / "docs" / "observability.md").read_text()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = {}
    for name, labels in re.findall(r"^\| `(pascal:\w+)(?:\{([\w,]+)\})?` \|", page, re.M):
        known[name] = {*labels.split(","), "instance", "dp_rank", "le"}
    used = set()
    for rule in rules():
        selectors, _ = parsed(rule["expr"])
        for name, matched in selectors:
            series = name.removesuffix("_bucket")
            assert series in known or name in recorded | {"up"}, rule
            assert matched <= known.get(series, {"job"}), rule
            used.add(name)
    assert recorded & used, "a rule that is recorded for an alert"


def test_every_alert_is_explained():
    page = (ROOT / "docs" / "observability.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert f"`{rule['alert']}`" in page
