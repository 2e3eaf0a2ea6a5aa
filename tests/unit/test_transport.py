"""KV transports: bytes arrive where they were put, and nowhere else."""

import dataclasses
import functools
import gc
import multiprocessing
import socket
import types
import weakref

import pytest

from pascal_sglang.cluster import transport
from pascal_sglang.cluster.transport import TransportError
from pascal_sglang.cluster.transport.listening import keep_to, listening
from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_migrations, idle_transport
from tests.ports import MOONCAKE, share
from tests.strangers import NOBODY, NoOtherHost, another_host, attempts

PATTERN = bytes(range(256)) * 16


@functools.cache
def loads(kind):
    try:
        transport.make(kind, 4096, 4096).close()
    except TransportError as error:
        return str(error)
    return None


def kinds():
    return [
        pytest.param(
            kind, marks=pytest.mark.skipif(bool(problem := loads(kind)), reason=problem or "")
        )
        for kind in transport.KINDS
    ]


def mooncake(listen=None):
    """Mooncake's transport, and the ports that it listens at; skips where it does not load."""
    if problem := loads("mooncake"):
        pytest.skip(problem)
    before = listening()
    made = transport.make("mooncake", 8192, 4096, listen=listen)
    ports = sorted(port for _, port in listening() - before)
    assert set(ports) <= set(share(MOONCAKE)), "another worker's engine may have taken them"
    return made, ports


def write(kind, address, offset):
    peer = transport.make(kind, 4096, len(PATTERN))
    peer.room(address, offset, len(PATTERN))[:] = PATTERN
    peer.put(address, offset, len(PATTERN))
    peer.room(address, offset + len(PATTERN), 256)[:] = PATTERN[:256]
    peer.put(address, offset + len(PATTERN), 256)


@pytest.mark.parametrize("kind", kinds())
def test_another_process_writes_into_the_landing(kind):
    here = transport.make(kind, 1 << 20, 4096)
    writer = multiprocessing.get_context("spawn").Process(
        target=write, args=(kind, here.address, 8192)
    )
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    end = 8192 + len(PATTERN) + 256
    assert here.receive_buffer[8192:end] == PATTERN + PATTERN[:256]
    assert not any(here.receive_buffer[:8192])
    assert not any(here.receive_buffer[end:])


@pytest.mark.parametrize("kind", kinds())
def test_what_cannot_be_written_is_an_error(kind):
    here, peer = transport.make(kind, 8192, 4096), transport.make(kind, 4096, 4096)
    for offset, size in ((4097, 4096), (-1, 10), (8192, 1)):
        with pytest.raises(TransportError, match="outside"):
            peer.room(here.address, offset, size)
    for address in ("", "/etc/passwd", "/proc/1/fd/../../etc/passwd", "host/1"):
        with pytest.raises(TransportError, match="address"):
            peer.room(address, 0, 16)
    if not peer.direct:
        with pytest.raises(TransportError, match="staging"):
            peer.room(here.address, 0, 4097)
    assert not any(here.receive_buffer)


@pytest.mark.parametrize("kind", kinds())
def test_all_that_a_device_touches_is_pinned_once(kind):
    here, pinned = transport.make(kind, 8192, 4096), []
    peer = transport.make(kind, 4096, 2048, pinned.append)
    assert pinned[0] is peer.receive_buffer
    room = [peer.room(here.address, at, 16) for at in (0, 64)]
    assert len(pinned) == 2
    assert [memory.nbytes for memory in pinned] == [4096, 8192 if peer.direct else 2048]
    room[0][:] = bytes(range(16))
    pinned[1][64:80] = bytes(range(16))
    assert all(memory == bytes(range(16)) for memory in (room[0], room[1 if peer.direct else 0]))


def test_landings_of_more_peers_than_there_can_be_are_refused(monkeypatch):
    monkeypatch.setattr("pascal_sglang.cluster.transport.shm.PEERS", 1)
    first, second, peer = (transport.make("shm", 4096, 4096) for _ in range(3))
    peer.room(first.address, 0, 16)
    with pytest.raises(TransportError, match="more than 1 receive buffers"):
        peer.room(second.address, 0, 16)
    peer.room(first.address, 16, 16)


def test_a_landing_that_is_gone_is_an_error():
    here, peer = (transport.make("shm", 4096, 4096) for _ in range(2))
    address = here.address
    here.close()
    with pytest.raises(TransportError, match="receive buffer"):
        peer.room(address, 0, 16)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(TransportError, match="auto, shm, mooncake"):
        transport.make("carrier pigeon", 1, 1)


def test_a_transport_that_is_not_installed_stops_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    several, one = types.SimpleNamespace(dp_size=2), types.SimpleNamespace(dp_size=1)
    asked, off = (PascalConfig(kv_transport="mooncake", migration=m) for m in ("adaptive", "off"))
    check_migrations(PascalConfig(), several)
    check_migrations(asked, one)
    check_migrations(off, several)
    with pytest.raises(LaunchError, match=r"not installed: pip install pascal_sglang\[mooncake\]"):
        check_migrations(asked, several)


def test_a_transport_that_nothing_uses_is_named():
    several, one = types.SimpleNamespace(dp_size=2), types.SimpleNamespace(dp_size=1)
    asked = PascalConfig(kv_transport="mooncake")
    assert "--pascal-kv-transport mooncake" in idle_transport(asked, several)
    assert idle_transport(asked, one) is None
    assert idle_transport(PascalConfig(), several) is None
    assert idle_transport(dataclasses.replace(asked, migration="adaptive"), several) is None


def test_a_peer_that_is_opened_is_pinned_before_anything_is_written_to_it():
    pinned = []
    here = transport.make("shm", 4096, 0)
    peer = transport.make("shm", 4096, 0, lambda memory: pinned.append(len(memory)))
    peer.open_peer("/proc/1/fd/no receive buffer")
    peer.open_peer(here.address)
    assert pinned == [4096, 4096]
    peer.room(here.address, 0, 16)
    assert pinned == [4096, 4096]


def test_the_buffer_of_a_peer_that_has_died_is_unpinned_and_given_back():
    given_back, nothing = [], lambda memory: None
    here = transport.make("shm", 4096, 0)
    peer = transport.make("shm", 4096, 0, nothing, None, lambda m: given_back.append(len(m)))
    peer.open_peer(here.address)
    mapped = weakref.ref(peer._peers[here.address].obj)
    peer.close_peer(here.address)
    peer.close_peer(here.address)
    peer.close_peer("/proc/1/fd/no receive buffer")
    assert given_back == [4096]
    gc.collect()
    assert mapped() is None


NOT_HERE = (("tcp", "127.0.0.2"), ("tcp6", "::1"))


def test_mooncake_hears_one_address_alone(caplog):
    _, ports = mooncake()
    assert len(ports) == 2, "metadata and data"
    assert "every user of this host can read and write" in caplog.text
    elsewhere = [(kind, host, p) for p in ports for kind, host in NOT_HERE]
    assert attempts([("tcp", "127.0.0.1", port) for port in ports]) == [None, None]
    assert None not in attempts(elsewhere)


@pytest.fixture
def network():
    """What `another_host` gives; skips where there can be none."""
    try:
        with another_host() as both:
            yield both
    except NoOtherHost as reason:
        pytest.skip(str(reason))


def test_mooncake_is_out_of_reach_of_other_hosts(network):
    there, our_address = network
    _, ports = mooncake()
    wanted = [("tcp", our_address, port) for port in ports]
    assert attempts(wanted, there) == ["timed out", "timed out"]
    # The same network reaches what was opened on purpose, there and nowhere else.
    _, ports = mooncake(our_address)
    wanted = [("tcp", our_address, port) for port in ports]
    assert attempts(wanted, there) == [None, None]
    assert attempts([("tcp", "127.0.0.1", ports[0])]) == ["timed out"]


def test_who_came_before_the_door_was_shut_stops_the_start():
    before = listening()
    with socket.create_server(("0.0.0.0", 0)) as door:
        with (
            socket.create_connection(("127.0.0.2", door.getsockname()[1])),
            pytest.raises(OSError, match=r"127\.0\.0\.2 came before"),
        ):
            keep_to("127.0.0.1", before)
        door.accept()[0].close()


def test_a_landing_in_shared_memory_is_its_users_alone():
    here = transport.make("shm", 4096, 4096)
    assert attempts([("open", here.address)]) == [None]
    assert attempts([("open", here.address)], user=NOBODY) == ["Permission denied"]


def test_an_address_of_another_host_stops_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config = PascalConfig(kv_transport="mooncake", kv_listen="198.51.100.7", migration="adaptive")
    check_migrations(config, types.SimpleNamespace(dp_size=1))
    with pytest.raises(LaunchError, match=r"--pascal-kv-listen 198\.51\.100\.7: "):
        check_migrations(config, types.SimpleNamespace(dp_size=2))
