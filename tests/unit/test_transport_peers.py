"""Mooncake's transport and peers that are away: what is being connected can be given up, a
connection that has died costs no write, and no peer costs the others one. The peers are processes
with addresses of their own on loopback; `test_transport_hosts` has real links.
"""

import signal
import socket
import subprocess
import threading
import time

import psutil
import pytest

from pascal_sglang.cluster import transport
from pascal_sglang.cluster.transport.listening import Gate, abort_connections, listening
from tests.unit.test_transport_hosts import LONG_S, Side

pytestmark = pytest.mark.usefixtures("engines_end")

# More than two kernels take of a write that nobody reads.
SIZE = 32 << 20


class Here:
    popen = staticmethod(subprocess.Popen)


def wait_until(holds):
    deadline = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def connections(status, host, port=None):
    """This process's with a host, in a state."""
    return [
        seen
        for seen in psutil.Process().net_connections("tcp")
        if seen.status == status
        and seen.raddr
        and seen.raddr.ip == host
        and port in (None, seen.raddr.port)
    ]


@pytest.fixture(scope="module")
def source():
    made = transport.make("mooncake", 4096, SIZE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def running(source):
    side = Side(Here, "127.0.0.2", SIZE)
    yield side
    side.process.kill()
    side.process.wait()


@pytest.fixture
def peer(source, running):
    """A peer that the source has written to."""
    running("open", source.address)
    source.open_peer(running.address)
    assert put(source, running.address) is True
    return running


def begun(source, address, size=1024):
    write = source.room(address, 0, size)
    write.memory[:] = b"x" * size
    write.begin()
    return write


def done(write):
    wait_until(lambda: write.query() is not None)
    return write.query()


def put(source, address):
    return done(begun(source, address))


def test_writes_to_a_host_that_drops_them_end_when_they_are_given_up(source, peer):
    """Two of them would take all there is to write from."""
    peer("close", source.address)
    for _ in range(transport.mooncake.WRITES):
        write = begun(source, peer.address)
        wait_until(lambda: connections(psutil.CONN_SYN_SENT, "127.0.0.2"))
        write.abandon()
        wait_until(lambda write=write: write.at_rest)
    assert connections(psutil.CONN_SYN_SENT, "127.0.0.2") == []
    peer("open", source.address)
    assert put(source, peer.address) is True


def test_a_connection_that_has_died_costs_no_write(source, peer):
    ports = {int(peer.data_port)}
    for _ in range(3):
        assert abort_connections("127.0.0.2", ports) == 1
        assert put(source, peer.address) is True


def test_a_write_that_waits_for_another_is_given_up_alone(source, peer):
    peer.process.send_signal(signal.SIGSTOP)
    try:
        front = begun(source, peer.address, SIZE)
        wait_until(lambda: connections(psutil.CONN_ESTABLISHED, "127.0.0.2"))
        wait_until(front.peer.writes.empty)
        queued = begun(source, peer.address)
        before = set(threading.enumerate())
        queued.abandon()
        for thread in set(threading.enumerate()) - before:
            thread.join(LONG_S)
    finally:
        peer.process.send_signal(signal.SIGCONT)
    assert done(front) is True
    wait_until(lambda: queued.at_rest)
    assert queued.query() is False


def test_a_first_contact_that_is_given_up_lets_others_write(source, peer):
    """It connects to a process that does not answer, after it was given up."""
    before = listening()
    with socket.create_server(("127.0.0.3", 0)) as door:
        gate, (host, port) = Gate("127.0.0.3", before), door.getsockname()
        first = begun(source, f"{host}:{port}/{port}/4096+4096")
        wait_until(lambda: connections(psutil.CONN_SYN_SENT, host, port))
        other = begun(source, peer.address)
        first.abandon()
        gate.admit(["127.0.0.1"])
        assert done(other) is True
        wait_until(lambda: first.at_rest)
        gate.close()


def test_a_peer_that_has_died_is_not_heard_any_more(source):
    """Its kernel may have bytes that it sends much later."""
    own = source.receive_buffer

    def heard():
        return [
            seen
            for seen in psutil.Process().net_connections("tcp")
            if seen.status == psutil.CONN_ESTABLISHED and seen.laddr.port in source.gate.ports
        ]

    side = Side(Here, transport.mooncake.LOOPBACK, 4096)
    try:
        for letter in "yz":  # The second time it stands for another instance on that host.
            source.open_peer(side.address)
            assert side("put", source.address, 0, 4096, letter, LONG_S)[0] is True
            assert bytes(own[:4]) == letter.encode() * 4
            assert heard()
            source.close_peer(side.address)
            assert heard() == []
    finally:
        side.process.kill()
        side.process.wait()
