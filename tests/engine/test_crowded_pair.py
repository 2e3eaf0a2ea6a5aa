"""Two instances with little memory that pause requests and move them by stop-and-copy.

Nothing of that shows, and every series that the dashboard asks for, with every label it uses, is on
`/metrics`.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.monitoring.dashboard import OUT
from tests.engine.test_migration import FLOOD, at_rest, flood
from tests.promql import parsed, queries
from tests.requests import generate

CROWDED = {"live_migration": False, "chaos": 0.02, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "2500", "--chunked-prefill-size", "64", "--dp-size", "2"]
# Prometheus adds these to what it scrapes.
TARGET = {"instance", "job"}


@pytest.fixture(scope="module")
def crowded(serve):
    with serve({**FLOOD, **CROWDED}, TIGHT, SGLANG_CPU_OMP_THREADS_BIND="0|1|0|1") as server:
        yield server


def test_a_flood_of_moves_and_pauses_is_invisible(crowded, reference):
    flood(crowded, 60, reference)


def placed(server, expected=None):
    """Requests placed so far, once the controller knows of none that runs."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        shown = server.get("/pascal/status")["controller"]
        count = sum(shown["placed"].values())
        if not shown["residents"] and expected in (None, count):
            return count
        time.sleep(0.2)
    raise AssertionError(f"expected {expected}: {shown}")


def test_health_probes_go_past_the_figures(crowded):
    """A busy instance drops them and says nothing, so the controller remembers nothing of them."""
    at_rest(crowded)
    before = placed(crowded)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(crowded.get, ["/health_generate"] * 4))
    crowded.post("/generate", generate("A user", None, 2))
    placed(crowded, before + 1)


def exported(text):
    """Names on `/metrics`, each with the labels of its samples."""
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_every_query_names_what_is_exported(crowded):
    """After a flood of those who pause and move, and one request that can do neither."""
    fixed = generate("Stay", think=5, total=20)
    fixed["sampling_params"]["frequency_penalty"] = 0.5
    crowded.post("/generate", fixed)
    found = exported(crowded.get("/metrics"))
    names = {name for name in found if name.startswith("pascal:")}
    assert len(names) > 30
    for query in queries(json.loads(OUT.read_text())):
        selectors, grouped = parsed(query)
        for name, matched in selectors:
            assert name in found, f"{name} is not exported; {query}"
            assert matched - TARGET <= found[name], query
        known = set().union(*(found[name] for name, _ in selectors)) | TARGET
        assert grouped <= known, query
