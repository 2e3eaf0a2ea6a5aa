"""Mooncake's transport between hosts: whom it hears, and what a bad link costs the thread that
asked for a write. The hosts are network namespaces with real links (`tests.hosts`).

`TEST_BAD_LINKS=1` adds what takes longer: the cut of ten seconds, loss, and a narrow link.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import hosts, kv_host
from tests.strangers import attempts

pytestmark = pytest.mark.usefixtures("engines_end")

pytest.importorskip("mooncake.engine", exc_type=ImportError)
NETWORK = f"{hosts.SUBNET}.0/24"
SIZE = 1 << 20
# Far longer than it takes.
LONG_S = 60.0
# A link so slow that some seconds lie between the first and the last of a write; and when it is
# given up, which is after what is to happen in between.
SLOW_S, GIVEN_UP_S = 0.3, 5.0
longer = pytest.mark.skipif(
    not os.environ.get("TEST_BAD_LINKS"), reason="longer: TEST_BAD_LINKS=1 runs it"
)


class Side:
    """A transport on a host."""

    def __init__(self, host, listen=NETWORK, size=SIZE):
        self.host = host
        folder = Path(kv_host.__file__).parents[1]
        self.process = host.popen(
            [sys.executable, kv_host.__file__, listen, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )
        self.address = self.answer()
        self.session, self.data_port, memory = self.address.split("/")
        self.memory = int(memory.partition("+")[0])

    def answer(self):
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return json.loads(line)

    def tell(self, *what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def __call__(self, *what):
        self.tell(*what)
        return self.answer()

    def put(self, other, letter="x", size=SIZE, seconds=LONG_S, offset=0):
        return self("put", other.address, offset, size, letter, seconds)

    def letters(self):
        return self("read", 0, SIZE)

    def wait_for(self, letter):
        """Until some of it has arrived."""
        deadline = time.monotonic() + LONG_S
        while letter not in self("read", 0, 64):
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture(scope="module")
def network():
    with hosts.network() as made:
        yield made


@pytest.fixture(scope="module")
def both(network):
    """Two hosts whose instances know each other."""
    first, second = Side(network.host()), Side(network.host())
    first("open", second.address)
    second("open", first.address)
    return first, second


@pytest.fixture
def restored(both):
    """All that a test does to the links is undone."""
    yield both
    for side in both:
        side.host.thaw()
        side.host.restore()
        side.host.fast()


def works_again(first, second):
    """The next write arrives, and nothing else does."""
    assert first("rest", LONG_S)
    assert first.put(second, "n")[0] is True
    assert second.letters() == {"n": SIZE}


def test_each_host_listens_at_its_own_address_of_the_network(both):
    first, second = both
    assert first.session.startswith(f"{first.host.address}:")
    assert second.session.startswith(f"{second.host.address}:")
    assert first.put(second, "a")[0] is True
    assert second.put(first, "b")[0] is True
    assert second.letters() == {"a": SIZE}
    assert first.letters() == {"b": SIZE}


def test_a_stranger_on_the_same_network_cannot_connect_read_or_write(network, both):
    first, second = both
    first.put(second, "k")
    stranger = network.host()
    ports = [int(second.session.partition(":")[2]), int(second.data_port)]
    wanted = [("tcp", second.host.address, port) for port in ports]
    assert attempts(wanted, stranger.prefix) == ["timed out", "timed out"]
    assert attempts(wanted, first.host.prefix) == [None, None], "who is known can"
    # With the engine itself, and told all that a peer knows.
    command = ["from tests.kv_host import *; import json, sys", "print(json.dumps(steal("]
    command[1] += f"{second.session!r}, {second.memory}, 4096)))"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(kv_host.__file__).parents[1]),
        "MC_HANDSHAKE_CONNECT_TIMEOUT": "1",
    }
    said = stranger.run([sys.executable, "-c", "\n".join(command)], env=environment)
    wrote, read, found = json.loads(said.splitlines()[-1])
    assert (wrote, read) == (-1, -1)
    assert found == {".": 4096}
    assert second.letters() == {"k": SIZE}


def test_what_a_peer_may_not_write_it_may_not_write(both):
    """The engine takes the registered receive buffer, and nothing beside it."""
    first, second = both
    beyond = second.address.replace(f"/{second.memory}+", f"/{second.memory + SIZE}+")
    assert first("put", beyond, 0, 4096, "z", LONG_S)[0] is False


def test_a_cut_link_makes_a_write_fail_and_nothing_of_it_comes_later(restored):
    first, second = restored
    first.put(second, "o")
    second.host.cut()
    assert first.put(second, "l", seconds=0.5)[0] is None, "it cannot have arrived"
    assert first("rest", LONG_S)
    second.host.restore()
    works_again(first, second)


def test_what_was_on_its_way_when_the_link_was_cut_is_not_sent_after_it(restored):
    """A kernel sends what a closed connection has left, when the link is back; here it does not."""
    first, second = restored
    first.host.slow(SLOW_S)
    first.tell("put", second.address, 0, SIZE, "w", GIVEN_UP_S)
    second.wait_for("w")
    second.host.cut()
    assert first.answer()[0] is None, "it was over before the cut: this shows nothing"
    assert first("rest", LONG_S)
    first.host.fast()
    before = second.letters()
    second.host.restore()
    assert first("put", second.address, SIZE - 64, 64, "e", LONG_S)[0] is True
    assert second.letters()["w"] == before["w"]
    works_again(first, second)


def test_what_a_killed_process_has_left_does_not_arrive_after_its_death_is_known(network, both):
    """Its kernel goes on sending that, when the link is back, into a slot that others have."""
    first, _ = both
    third = Side(network.host())
    first("open", third.address)
    first("open", third.address.replace("+", "1+"))  # Another instance there, so it is heard.
    third("open", first.address)
    assert third.put(first, "o")[0] is True
    third.host.slow(SLOW_S)
    third.tell("put", first.address, 0, SIZE, "w", LONG_S)
    first.wait_for("w")
    third.host.cut()
    third.process.kill()
    third.process.wait()
    first("close", third.address)
    before = first.letters()
    assert before.get("o"), "it was over before the cut: this shows nothing"
    third.host.fast()
    third.host.restore()
    deadline = time.monotonic() + LONG_S
    sending = f":{int(first.data_port):04X} 04 "  # FIN_WAIT1
    while sending in third.host.run(["cat", "/proc/net/tcp"]):
        assert time.monotonic() < deadline, "its kernel still has something to send"
        time.sleep(0.01)
    assert first.letters() == before
    third.host.end()


def test_a_frozen_peer_costs_no_more_than_the_wait(restored):
    first, second = restored
    second.host.freeze()
    assert first.put(second, "f", seconds=0.5)[0] is None
    assert first("rest", LONG_S)
    second.host.thaw()
    works_again(first, second)


@longer
def test_a_link_that_is_cut_for_ten_seconds(restored):
    first, second = restored
    second.host.cut()
    assert first.put(second, "c", seconds=10)[0] is None
    second.host.restore()
    works_again(first, second)


@longer
def test_a_slow_link_that_loses_packets_carries_all(restored):
    first, second = restored
    second.host.slow(0.05, 0.01)
    for letter in "stuvw":
        assert first.put(second, letter, seconds=60)[0] is True
        assert second.letters() == {letter: SIZE}


def test_a_peer_that_is_killed_fails_the_write_that_is_under_way(network, both):
    first, _ = both
    third = Side(network.host())
    first("open", third.address)
    third("open", first.address)
    first.host.slow(SLOW_S)
    first.tell("put", third.address, 0, SIZE, "d", GIVEN_UP_S)
    third.wait_for("d")
    third.host.kill()
    done = first.answer()[0]
    first.host.fast()
    assert done is not True
    assert first("rest", LONG_S)
    first("close", third.address)
    works_again(*both)
