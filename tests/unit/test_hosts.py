"""Hosts of namespaces are as far from each other as those on a network."""

import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from tests import hosts

LISTEN = """
import socket, sys
one = socket.create_server((sys.argv[1], 4321))
print("ready", flush=True)
while True:
    peer, _ = one.accept()
    with peer:
        peer.sendall(peer.recv(100))
"""
ASK = """
import socket, sys, time
begin = time.monotonic()
one = socket.create_connection((sys.argv[1], 4321), timeout=float(sys.argv[2]))
one.sendall(b"hello")
print(one.recv(100).decode(), time.monotonic() - begin)
"""


@pytest.fixture(scope="module")
def network():
    with hosts.network() as network:
        network.host()
        network.host()
        yield network


@pytest.fixture
def pair(network):
    return network.hosts


@contextmanager
def listening(host):
    code = [sys.executable, "-S", "-c", LISTEN, host.address]
    with host.popen(code, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def ask(host, address, timeout=10.0):
    """Seconds until an answer, None without one."""
    code = [*host.prefix, sys.executable, "-S", "-c", ASK, address, str(timeout)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    if done.returncode:
        assert "timed out" in done.stderr, done.stderr
        return None
    word, took = done.stdout.split()
    assert word == "hello"
    return float(took)


def test_they_share_neither_names_nor_folders_nor_processes(pair, network):
    first, second = pair
    for folder in ("/tmp", "/dev/shm"):
        first.run(["touch", f"{folder}/mine"])
        assert second.run(["ls", folder]) == ""
    first.run(["touch", network.shared / "ours"])
    second.run(["cat", network.shared / "ours"])
    assert second.run(["cat", "/proc/sys/kernel/hostname"]) == "host2\n"
    assert len(second.run(["ps", "-e", "-o", "pid="]).split()) == 2
    clock = [sys.executable, "-S", "-c", "import time; print(time.perf_counter())"]
    assert abs(float(second.run(clock)) - float(first.run(clock))) > 500


def test_a_port_of_a_host_can_be_reached_from_the_machine(pair):
    with listening(pair[1]), pair[1].forwarded(4321) as port:
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
                one.sendall(b"hello")
                assert one.recv(100) == b"hello"
                assert one.recv(100) == b""


def test_a_cut_a_slow_link_and_a_frozen_host(pair):
    first, second = pair
    with listening(second) as process:
        assert ask(first, second.address) is not None
        second.cut()
        assert ask(first, second.address, 0.2) is None
        second.restore()
        assert ask(first, second.address) is not None
        second.slow(0.05)
        took = ask(first, second.address)
        assert took is not None
        assert took >= 0.2, "two round trips, each way 50 ms"
        second.fast()
        second.slow(0.0, loss=1.0)
        assert ask(first, second.address, 0.2) is None
        second.fast()
        assert ask(first, second.address) is not None
        second.freeze()
        assert ask(first, second.address, 0.2) is None
        second.thaw()
        assert ask(first, second.address) is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_a_killed_host_takes_all_along_and_boots_again(pair):
    first, second = pair
    second.run(["touch", "/tmp/mine"])
    with listening(second) as process:
        second.freeze()
        second.kill()
        assert process.poll() is not None
    assert second.processes() == []
    second.boot()
    assert second.run(["ls", "/tmp"]) == ""
    with listening(second):
        assert ask(first, second.address) is not None


def test_hosts_end_with_the_process_that_made_them(pair):
    """However it ends."""
    code = (
        "import os; from tests import hosts; n = hosts.Network(); h = n.host();"
        "p = h.popen(['sleep', '1000']); print(p.pid, n.shared, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid, shared = done.stdout.split()
    if psutil.pid_exists(int(pid)):
        psutil.Process(int(pid)).wait(10)
    subprocess.run(["rm", "-r", shared], check=True)
