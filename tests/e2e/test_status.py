"""`GET /pascal/status` and the page that shows it, on a live server."""

import importlib.metadata
import threading
import time
import urllib.error
import urllib.request

import pytest

from pascal_sglang.entrypoints.live_page import headers, page
from tests.requests import generate


def test_the_status_says_what_runs_here(pascal_server):
    status = pascal_server.get("/pascal/status")
    assert status["version"] == importlib.metadata.version("pascal_sglang")
    assert status["sglang_version"].startswith("0.5.")
    assert status["model"] == status["model_path"]
    assert 0 < status["uptime_s"] < 3600
    assert status["config"]["policy"] == "pascal"
    (instance,) = status["instances"]
    assert instance["kv_tokens"]["host_capacity"] > 0
    again = pascal_server.get("/pascal/status")
    assert again["uptime_s"] > status["uptime_s"]


def test_live_requests_say_where_they_stand_and_the_list_can_be_bounded(pascal_server):
    rids = [f"status-{index}" for index in range(3)]
    bodies = [generate(f"Stand {rid}", think=600, total=2500, rid=rid) for rid in rids]
    callers = [
        threading.Thread(target=pascal_server.post, args=("/generate", body)) for body in bodies
    ]
    for caller in callers:
        caller.start()
    seen, bounded = {}, None
    while any(caller.is_alive() for caller in callers):
        phases = [{each["phase"] for each in seen.get(rid, ())} for rid in rids]
        if bounded is not None and all("answering" in each for each in phases):
            for rid in rids:
                pascal_server.post("/abort_request", {"rid": rid})
            break
        (instance,) = pascal_server.instances()
        for request in instance["requests"]:
            seen.setdefault(request["rid"], []).append(request)
        if len(instance["requests"]) == 3 and bounded is None:
            bounded = pascal_server.get("/pascal/status?requests=1")["instances"][0]
        time.sleep(0.05)
    for caller in callers:
        caller.join(60)
    for rid in rids:
        shown = seen[rid]
        assert {each["status"] for each in shown} <= {"waiting", "running"}
        assert "running" in {each["status"] for each in shown}
        assert {each["class"] for each in shown if each["phase"] == "reasoning"} == {"thinking"}
        ages = [each["age_s"] for each in shown]
        assert ages == sorted(ages)
        assert ages[0] > 0
        ended = pascal_server.recent(rid)
        assert ended["took_s"] > ended["ttfo_s"] > 0
    assert bounded is not None
    assert len(bounded["requests"]) == 1
    assert bounded["more_requests"] >= 1


@pytest.mark.parametrize("wrong", ["-1", "many", "1.5", ""])
def test_a_wrong_bound_is_refused(pascal_server, wrong):
    with pytest.raises(urllib.error.HTTPError) as refused:
        pascal_server.get(f"/pascal/status?requests={wrong}")
    assert refused.value.code == 400


def test_the_page_is_served_with_its_headers(pascal_server):
    with urllib.request.urlopen(f"{pascal_server.base_url}/pascal/", timeout=30) as reply:
        assert reply.read().decode() == page()
        assert reply.headers.get_content_type() == "text/html"
        for name, value in headers().items():
            assert reply.headers[name] == value
