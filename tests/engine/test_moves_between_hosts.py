"""Requests that move over a link which is slow, or cut, or whose other end is gone: moves are given
up and nothing else. The link is a real one between two hosts (`tests.hosts`), and Mooncake's engine
writes over it; `TEST_BAD_LINKS=1` adds what takes minutes."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import hosts
from tests.engine.load import run
from tests.engine.test_migration import (
    all_is_given_back,
    at_rest,
    differences,
    nothing_left,
    total,
    wait_for,
)

pytest.importorskip("mooncake.engine", exc_type=ImportError)
ON_HOSTS = (sys.executable, str(Path(__file__).with_name("instances_on_hosts.py")), "serve")
SETTINGS = {
    "force_migration": 0.02,
    "kv_transport": "mooncake",
    "kv_listen": f"{hosts.SUBNET}.0/24",
}
GIVEN_UP = ("kept:timeout", "kept:transport")
longer = pytest.mark.skipif(
    not os.environ.get("TEST_BAD_LINKS"), reason="minutes: TEST_BAD_LINKS=1 runs it"
)


@contextmanager
def two_hosts(serve):
    """A server with an instance on each of two hosts, and the host of the second one."""
    with hosts.network() as network:
        both = network.host(), network.host()
        namespaces = ",".join(f"/proc/{host._inside.init}/ns/net" for host in both)
        with serve(SETTINGS, ["--dp-size", "2"], ON_HOSTS, TEST_HOSTS=namespaces) as server:
            yield server, both[1]


def outgoing(server, *outcomes):
    shown = server.get("/pascal/status")
    alive = [i for i in shown["instances"] if not i.get("dead")]
    return total(alive, "outgoing", *outcomes)


def more(server, before, *outcomes):
    """Wait until more moves have ended so."""
    wait_for(server, lambda _: outgoing(server, *outcomes) > before)


def longest_ms(server):
    """The most that moves have taken of a pass on any instance."""
    found = re.findall(r"MOVES TOOK ([0-9.]+) ms", server.output)
    return max(map(float, found), default=0.0)


def whole_again(server, reference, count):
    """Requests move again over the link, and nothing is left of what was given up."""
    before, deadline = outgoing(server, "moved"), time.monotonic() + 60
    while outgoing(server, "moved") == before:
        assert time.monotonic() < deadline, "none moves"
        assert differences(run(server, count)[0], reference) == []
    nothing_left(at_rest(server))
    wait_for(server, all_is_given_back)


def rounds(server, over):
    """What came back of the load, which comes again until it is told that all is seen."""
    found = []
    while not over.is_set():
        found.append(run(server, 20)[0])
    return found


def test_a_cut_link_makes_moves_stay_and_nothing_else(serve, reference):
    over = threading.Event()
    with two_hosts(serve) as (server, host), ThreadPoolExecutor(1) as pool:
        job = pool.submit(rounds, server, over)
        try:
            more(server, 2, "moved")
            host.cut()
            more(server, 1, *GIVEN_UP)
        finally:
            over.set()
        for whole in job.result():
            assert differences(whole, reference) == []
        host.restore()
        whole_again(server, reference, 8)


def ten_seconds(host, server):
    host.cut()
    time.sleep(10)
    host.restore()


def slow(host, server):
    """Where a step takes little, requests end before they could move over it."""
    over = ("moved", *GIVEN_UP)
    host.slow(0.05, 0.01)
    more(server, outgoing(server, *over) + 3, *over)
    host.fast()


def narrow(host, server):
    """100 Mbit/s, and then what no move keeps up with."""
    tc = [*host._network.switch.prefix, "tc", "qdisc"]
    for rate in ("100mbit", "64kbit"):
        limit = f"replace dev {host.port} root tbf rate {rate} burst 4kb latency 400ms"
        subprocess.run([*tc, *limit.split()], check=True, timeout=30)
        time.sleep(3)
    subprocess.run([*tc, *f"delete dev {host.port} root".split()], check=True, timeout=30)


@longer
@pytest.mark.parametrize("fault", [ten_seconds, slow, narrow])
def test_a_bad_link_makes_moves_stay_and_nothing_else(fault, serve, reference):
    with two_hosts(serve) as (server, host), ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, server, 60)
        more(server, 2, "moved")
        fault(host, server)
        assert differences(job.result()[0], reference) == []
        whole_again(server, reference, 30)
        ended = [i["migrations"]["outgoing"] for i in at_rest(server)]
        print(f"{fault.__name__}: moves took {longest_ms(server)} ms of a pass at most, {ended}")
