"""Debian's Prometheus scrapes a live server, and is asked what the dashboard and the rules ask."""

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from launch.monitoring.dashboard import OUT
from tests.ports import free_port
from tests.promql import queries
from tests.requests import generate
from tests.scrapers import ACCEPTS

MONITORING = Path(__file__).parents[2] / "launch" / "monitoring"
# A scrape that takes longer fails, and leaves no series.
EVERY = "1s"
ANSWERED = 'sum(pascal:requests_total{outcome="answered"})'


class Prometheus:
    """One that runs; `get` asks its API. at: when all that tests ask for was there."""

    def __init__(self, url):
        self.url, self.at = url, None

    def get(self, path, **parameters):
        whole = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(whole, timeout=30) as reply:
            return json.loads(reply.read())["data"]

    def ask(self, query, at=None):
        """The samples of an instant query: labels and value."""
        found = self.get("query", query=query, time=at or self.at)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def wait_for(self, query, least, why):
        """Until a sample has that value at least. Returns when, and what there was."""
        deadline = time.monotonic() + 60
        while True:
            found = self.ask(query, at := time.time())
            if any(value >= least for _, value in found):
                return at, found
            assert time.monotonic() < deadline, f"{why}: {query} is {found}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def prometheus(pascal_server, tmp_path_factory):
    """After some requests have come and gone under its eyes."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus: Debian's package has it")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [pascal_server.base_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        made = Prometheus(f"http://{address}")
        deadline = time.monotonic() + 60
        while True:
            try:
                made.get("query", query="1")
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        made.wait_for('up{job="pascal_sglang"}', 1, "the server is scraped")
        _, ((_, before),) = made.wait_for(ANSWERED, 0, "series keep their names")
        for index in range(4):
            pascal_server.stream("/generate", generate(f"Measure {index}", think=8, total=24))
        ended, _ = made.wait_for(ANSWERED, before + 4, "what ended is seen")
        made.at, _ = made.wait_for("min(timestamp(pascal:starts_total))", ended, "and seen again")
        yield made
    finally:
        process.terminate()
        process.wait(30)


def panels():
    return [p for p in json.loads(OUT.read_text())["panels"] if p["type"] != "row"]


def test_every_panel_is_filled_or_says_why_not(prometheus):
    empty = []
    for panel in panels():
        for query in queries({"panels": [panel]}):
            if all(math.isnan(value) for _, value in prometheus.ask(query)):
                empty.append(panel["title"])
                assert panel["fieldConfig"]["defaults"].get("noValue"), query
    assert len(set(empty)) <= len(panels()) / 2


def test_the_legend_names_its_instance(prometheus):
    named = 0
    for panel in panels():
        for target in panel["targets"]:
            if "{{dp_rank}}" in target["legendFormat"]:
                (query,) = queries({"panels": [{"targets": [target]}]})
                for labels, _ in prometheus.ask(query):
                    named += 1
                    assert labels["dp_rank"] == "0"
                    assert labels["instance"]
    assert named > 3


def test_every_rule_is_evaluated_and_no_alert_fires(prometheus):
    written = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    deadline = time.monotonic() + 60
    while True:
        groups = prometheus.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in rules):
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(rules) == sum(len(group["rules"]) for group in written)
    assert [rule["lastError"] for rule in rules if rule["health"] != "ok"] == []
    assert prometheus.ask('ALERTS{alertstate="firing"}', time.time()) == []
    for name in ("instance:pascal_ttfo_seconds:p95_5m", "instance_dp_rank:pascal_host_kv:usage"):
        prometheus.wait_for(f"count({name})", 1, "it is recorded")


@pytest.mark.parametrize("scraper", ACCEPTS)
def test_names_survive_every_scraper(pascal_server, scraper):
    asked = urllib.request.Request(
        f"{pascal_server.base_url}/metrics", headers={"Accept": ACCEPTS[scraper]}
    )
    with urllib.request.urlopen(asked, timeout=30) as reply:
        names = {line.split("{")[0] for line in reply.read().decode().splitlines()}
    assert {"pascal:requests_total", "sglang:token_usage"} <= names
    assert not [name for name in names if name.startswith(("pascal_", "sglang_"))]
