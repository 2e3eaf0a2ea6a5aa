"""How evenly instances are used, and how often requests move between them."""

import http.server
import json
import threading

import pytest

from evals.reporting import balance, report
from evals.reporting.balance import Balance, shares


def told(*used, capacity=100):
    return json.dumps(
        {"loads": [{"num_used_tokens": n, "max_total_num_tokens": capacity} for n in used]}
    )


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]", "{}", '{"loads": [{}]}', '"x"'])
def test_what_is_no_load_is_left_out(text):
    assert shares(text) == []


def test_an_instance_without_kv_is_left_out():
    assert shares(told(5, capacity=0)) == []


def test_imbalance_is_how_far_the_fullest_is_from_the_emptiest():
    seen = Balance([[0.0, 0.0], shares(told(90, 10, 50)), [0.5, 0.5], []])
    assert seen.summary() == {"kv_imbalance": pytest.approx(0.4)}
    assert Balance([[0.7]]).summary() == {"kv_imbalance": None}
    assert Balance().summary() == {"kv_imbalance": None}


@pytest.mark.parametrize(("used", "again"), [((30, 10), True), ((30,), False)])
def test_a_server_is_asked_again_only_if_it_has_several_instances(used, again):
    asked = threading.Semaphore(0)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path.startswith("/v1/loads") else 404)
            self.end_headers()
            self.wfile.write(told(*used).encode())
            asked.release()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with balance.watching(f"http://127.0.0.1:{server.server_port}") as seen:
            assert asked.acquire(timeout=10)
            assert asked.acquire(timeout=10 if again else 3 * balance.EVERY_S) == again
        server.shutdown()
    expected = pytest.approx(0.2) if again else None
    assert seen.summary() == {"kv_imbalance": expected}


def test_a_server_that_does_not_answer_is_no_error():
    with balance.watching("http://127.0.0.1:9") as seen:
        pass
    assert seen.summary() == {"kv_imbalance": None}


def test_moves_are_counted_where_they_began():
    counters = {
        'pascal:migrations_total{way="out",outcome="moved"}': 3.0,
        'pascal:migrations_total{way="in",outcome="taken"}': 3.0,
        'pascal:migrations_total{way="out",outcome="kept:full"}': 2.0,
        "pascal:starts_total": 9.0,
    }
    assert report.migrations(counters) == 3.0
    assert report.migrations({}) == 0.0
