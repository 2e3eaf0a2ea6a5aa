"""What two workers that run at the same time start never meets at a port."""

import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from sglang.srt import server_args
from sglang.srt.utils import network

from evals.load.server import PORTS, ArmError
from tests import ports, warm_servers, workers
from tests.harness import Server

ROOT = Path(__file__).parents[2]


def of_worker(monkeypatch, number, count):
    """The ports that tests ask for there, and those that a fork draws of."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{number}")
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(count))
    asked = {ports.free_port() for _ in range(ports.ASKED_FOR)}
    first, last = map(int, ports.environment()["TEST_PORTS"].split("-"))
    assert first > max(asked) + 240, "what DP attention takes is between them"
    return [*asked, *range(first, last + 1)]


@pytest.mark.parametrize("count", [1, 2, ports.MOST_WORKERS])
def test_no_port_is_two_workers(monkeypatch, count):
    whole = [port for w in range(count) for port in of_worker(monkeypatch, w, count)]
    assert len(whole) == len(set(whole)) > 2000
    assert set(whole) <= set(ports.TESTS)
    others = {*PORTS, *ports.MOONCAKE, *ports.RAY_WORKERS, *range(22_000, 30_000)}
    assert not others.intersection(whole)


def test_sglang_draws_where_a_fork_is_told_to(monkeypatch):
    draw = getattr(network, "get_free_port_below_ephemeral", None)
    if draw is None:
        pytest.skip("this release has the system choose")
    assert server_args.get_free_port_below_ephemeral is draw
    before = draw.__defaults__
    assert set(before[:2]) == {22_000, 29_999}, "where it draws if nobody tells it"
    try:
        warm_servers._draw_ports("18450-18550")
        assert {draw() for _ in range(20)} <= set(range(18_450, 18_551))
    finally:
        draw.__defaults__ = before


def test_tests_ask_for_ports_in_one_place():
    """That of `evals` may be another worker's a moment later."""
    asks = re.compile(r"^from evals\.load\.server import .*\bfree_port\b", re.M)
    assert [p.name for p in (ROOT / "tests").rglob("*.py") if asks.search(p.read_text())] == []


def test_what_shares_servers_is_one_workers_and_short_tests_come_last():
    files = [f"tests/{file}.py::test" for group in workers.GROUPS for file in group]
    assert len(files) == len(set(files))
    assert all((ROOT / file.partition("::")[0]).exists() for file in files)
    assert sorted(files, key=workers.place) == files
    units = [file for file in files if file.startswith("tests/unit/")]
    others = ["tests/engine/test_dp_attention.py::a", "tests/unit/test_ports.py::a"]
    expected = [*files[: -len(units)], others[0], *units, others[1]]
    assert sorted([*reversed(others), *files], key=workers.place) == expected


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_that_another_run_started_at_the_port_is_not_taken_for_ones_own(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setattr(ports, "free_port", lambda: other.server_port)
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        with pytest.raises(ArmError, match="another process listens"), Server(command, []):
            pass
        other.shutdown()
