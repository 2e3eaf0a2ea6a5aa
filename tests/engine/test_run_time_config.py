"""The configuration changes while the server runs, all of it or nothing; tenants among the rest."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints.tenants import digest
from tests.engine.load import settled
from tests.requests import chat, generate


@pytest.fixture
def server(pascal_server):
    """Every test leaves the shared server as it was."""
    before = PascalConfig().changeable()
    yield pascal_server
    pascal_server.put("/pascal/config", before)


def refused(server, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.put("/pascal/config", body)
    said = caught.value.read().decode()
    assert "Traceback" not in said
    return caught.value.code, json.loads(said)["message"]


def test_all_of_it_changes_and_requests_go_by_it_from_then_on(server):
    before = server.get("/pascal/config")
    assert before["config"]["answer_tpot_ms"] == 100.0
    assert server.get("/pascal/config") == before
    changes = {"answer_tpot_ms": 40, "log_decisions": True, "quantum_tokens": 30, "qoe_slo": 0.5}
    after = server.put("/pascal/config", changes)
    assert after == {**before, "config": {**before["config"], **changes}}
    assert server.get("/pascal/config") == after
    (instance,) = server.instances()
    assert instance["config"].items() >= changes.items()
    written = server.output.count('{"decision": "start"')
    server.post("/generate", generate("Hm", think=3, total=6))
    assert server.output.count('{"decision": "start"') == written + 1
    assert "the configuration changes: answer_tpot_ms=40.0 log_decisions=True" in server.output
    server.put("/pascal/config", {"log_decisions": False})
    server.post("/generate", generate("Hm", think=3, total=6))
    assert server.output.count('{"decision": "start"') == written + 1


def test_a_stream_is_paced_from_the_change_on(server):
    def took():
        began = time.monotonic()
        events = server.stream("/generate", generate("Hm", think=None, total=12))
        first, last = (events[i]["meta_info"]["completion_tokens"] for i in (0, -1))
        return first, last, time.monotonic() - began

    server.put("/pascal/config", {"pace_stream": True, "answer_tpot_ms": 200})
    first, last, seconds = took()
    assert last == 12
    # A busy server may put two into the first event.
    assert seconds > (12 - first) * 0.2, "no token after it comes sooner than the reader's pace"
    server.put("/pascal/config", {"pace_stream": False})
    assert took()[1] == 12


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"", "the body is not JSON"),
        ([1], "must be a JSON object"),
        (b'{"answer_tpot_ms": 40, "answer_tpot_ms": 50}', "'answer_tpot_ms' twice"),
        ({"answer_tpot_ms": 40, "max_ttfo": 10**400}, "max_ttfo must be a number above 0"),
        ({"answer_tpot_ms": 40, "effort_budgets": []}, "effort_budgets must be a text"),
        ({"answer_tpot_ms": 40, "nothing": 1}, "the configuration has no 'nothing'"),
        ({"answer_tpot_ms": 40, "policy": "rr"}, "policy cannot change while the server runs"),
        ({"answer_tpot_ms": 40, "quantum_tokens": 0}, "quantum_tokens must be a whole number"),
        ({"answer_tpot_ms": 40, "pace_stream": "yes"}, "pace_stream must be true or false"),
        (b'{"answer_tpot_ms": NaN}', "answer_tpot_ms must be a number above 0"),
        ({"answer_tpot_ms": 40, "brownout": "P75"}, "brownout needs --enable-strict-thinking"),
        ({"fairness": "header:a b"}, "fairness must be off, api-key, user or header:NAME"),
    ],
)
def test_a_bad_change_is_one_clear_line_and_nothing_changes(server, body, says):
    before = server.get("/pascal/config")
    code, message = refused(server, body)
    assert code == 400
    assert says in message
    assert "\n" not in message
    assert server.get("/pascal/config") == before
    (instance,) = server.instances()
    assert instance["config"] == PascalConfig().changeable()
    assert len(server.post("/generate", generate("Hm", None, 4))["output_ids"]) == 4


def test_no_other_method_and_no_change_by_reading(server):
    before = server.get("/pascal/config")
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/pascal/config", {"answer_tpot_ms": 40})
    assert caught.value.code == 405
    assert server.put("/pascal/config", {}) == before


def answers(server, meanwhile):
    """Output ids of more requests than memory takes; `meanwhile` is called with 0, 1, 2, ..."""
    bodies = [generate(f"Under way {i}", think=60, total=100 + i) for i in range(90)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        jobs = [pool.submit(server.post, "/generate", body, 300) for body in bodies]
        number = 0
        while not all(job.done() for job in jobs):
            meanwhile(number)
            number += 1
        return [job.result()["output_ids"] for job in jobs]


def test_requests_under_way_keep_their_tokens(server):
    """The order changes among requests that wait, are paused and run, again and again."""
    plain = answers(server, lambda _: time.sleep(0.1))
    seen = []

    def change(number):
        quantum, fairness = (20, "user") if number % 2 else (35, "off")
        server.put("/pascal/config", {"quantum_tokens": quantum, "fairness": fairness})
        seen.append(sum(i["paused"] + i["waiting"] for i in server.instances()))

    assert answers(server, change) == plain
    assert len(seen) > 3
    assert max(seen) > 5, "nothing waited"
    instance = settled(server)
    assert (instance["policy_errors"], instance["queue_errors"]) == (0, 0)


def send(server, tenant, body):
    headers = {"Content-Type": "application/json", "X-Tenant": tenant}
    path = "/v1/chat/completions" if "messages" in body else "/generate"
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.base_url}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        json.loads(reply.read())
    return time.monotonic()


def crowd(server):
    """When the requests of each tenant ended: one sends 150, then the other 8; of the 150, those
    that were still there. They are many times the bound, however fast the machine is."""
    with ThreadPoolExecutor(158) as pool:
        body = generate("Heavy", think=250, total=300)
        heavy = [pool.submit(send, server, "heavy", body) for _ in range(150)]
        deadline = time.monotonic() + 60
        while sum(i["waiting"] + i["paused"] for i in server.instances()) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        bodies = [generate("Light", think=100, total=130), chat("Light", think=100, total=130)] * 4
        sent = time.monotonic()
        light = [pool.submit(send, server, "light", body) for body in bodies]
        shown, over = [], False
        # Once more when all have ended: what tenants have been served is remembered.
        while not over:
            over = all(job.done() for job in light)
            shown += [i["tenants"] for i in server.instances() if i["tenants"]]
            time.sleep(0.05)
        heavy = [ended for job in heavy if (ended := job.result()) > sent]
        return heavy, [job.result() for job in light], shown


def overtaken(heavy, light):
    """The mean share of the heavy tenant's requests that ended before one of the light's."""
    return sum(sum(h < each for h in heavy) / len(heavy) for each in light) / len(light)


def test_a_light_tenant_does_not_wait_behind_a_heavy_one(server):
    """Nothing of it is decided by a priority or a pace: by arrival alone the light one is last."""
    server.put("/pascal/config", {"fairness": "header:x-tenant"})
    heavy, light, shown = crowd(server)
    assert overtaken(heavy, light) < 0.8
    one, other = digest("heavy"), digest("light")
    leads = [s["ahead_s"] for s in shown if s["ahead_s"].keys() >= {one, other}]
    assert max(each[one] - each[other] for each in leads) > 0
    assert "heavy" not in json.dumps(shown)
    instance = settled(server)
    assert (instance["policy_errors"], instance["queue_errors"]) == (0, 0)
    assert instance["requests"] == []
