"""KV transports: bytes arrive where they were put, and nowhere else."""

import contextlib
import dataclasses
import errno
import functools
import gc
import ipaddress
import multiprocessing
import os
import socket
import sys
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from pascal_sglang.cluster import transport
from pascal_sglang.cluster.transport import TransportError
from pascal_sglang.cluster.transport.listening import (
    MOST_HOSTS,
    Gate,
    abort_connections,
    listening,
    own_address,
)
from pascal_sglang.config import LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_migrations, idle_transport
from tests.ports import MOONCAKE, share
from tests.strangers import NOBODY, NoOtherHost, another_host, attempts

pytestmark = pytest.mark.usefixtures("engines_end")

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


def put(peer, address, offset, what, within_s=20.0):
    """Whether it arrives."""
    one = peer.room(address, offset, len(what))
    one.memory[:] = what
    one.begin()
    return wait_for(one, within_s)


def wait_for(one, within_s=20.0):
    deadline = time.monotonic() + within_s
    while (done := one.query()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return done


def write(kind, address, offset):
    peer = transport.make(kind, 4096, len(PATTERN))
    for at, what in ((offset, PATTERN), (offset + len(PATTERN), PATTERN[:256])):
        assert put(peer, address, at, what)


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
    rooms = [peer.room(here.address, at, 16).memory for at in (0, 64)]
    assert [memory.nbytes for memory in pinned[1:]] == ([8192] if peer.direct else [2048] * 2)
    ours = [memory.obj for memory in pinned[1:]]
    assert all(memory.obj in ours for memory in rooms)


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


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs Mooncake in a place of its own: its distributions, with their versions."""
    monkeypatch.delenv("MC_TCP_PROTO", raising=False)
    monkeypatch.delitem(sys.modules, "mooncake", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").touch()

    def install(**versions):
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    return install


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"mooncake_transfer_engine": "0.3.12"}, None),
        ({"mooncake_transfer_engine_cuda13": "0.3.13.post1"}, None),
        ({"mooncake_transfer_engine_cuda13": "0.3.11.post1"}, "mooncake_transfer_engine_cuda13"),
        (
            {"mooncake_transfer_engine": "0.3.9", "mooncake_transfer_engine_non_cuda": "0.3.13"},
            "mooncake_transfer_engine 0.3.9",
        ),
        ({}, "no version"),
    ],
)
def test_an_engine_whose_writes_are_not_acknowledged_stops_the_start(installed, versions, problem):
    """What it calls done may not have arrived, and the answers would be wrong."""
    installed(**versions)
    found = transport.problem_with("mooncake")
    if problem is None:
        assert found is None
        return
    assert "0.3.12 or newer" in found
    assert problem in found
    with pytest.raises(TransportError, match=r"0\.3\.12 or newer"):  # On any other host, too.
        transport.make("mooncake", 4096, 4096)


def test_a_protocol_without_acknowledgements_stops_the_start(installed, monkeypatch):
    installed(mooncake_transfer_engine="0.3.13")
    monkeypatch.setenv("MC_TCP_PROTO", "2")
    assert transport.problem_with("mooncake") is None
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    assert "MC_TCP_PROTO=1" in transport.problem_with("mooncake")
    with pytest.raises(TransportError, match="MC_TCP_PROTO=1"):
        transport.make("mooncake", 4096, 4096)


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
    # What was opened on purpose hears this host at that address and nowhere else, and of others
    # those alone whose instances are known.
    made, ports = mooncake(our_address)
    wanted = [("tcp", our_address, port) for port in ports]
    assert attempts(wanted) == [None, None]
    assert attempts([("tcp", "127.0.0.1", ports[0])]) == ["timed out"]
    assert attempts(wanted, there) == ["timed out", "timed out"]
    their_address = str(ipaddress.IPv4Address(our_address) - 1)
    instances = [f"{their_address}:15001/{port}/4096+4096" for port in (15002, 15003)]
    for instance in instances:
        made.open_peer(instance)
    assert attempts(wanted, there) == [None, None]
    made.close_peer(instances[0])
    assert attempts(wanted, there) == [None, None], "another instance is there"
    made.close_peer(instances[1])
    assert attempts(wanted, there) == ["timed out", "timed out"]
    # Nobody is let in by what is no address, nor by a name.
    for wrong in ("0.0.0.0:1/2/3+4", "there:1/2/3+4", f"{their_address}:1", "/proc/1/fd/3", ""):
        made.open_peer(wrong)
    assert attempts(wanted, there) == ["timed out", "timed out"]


def addresses_of(monkeypatch, **interfaces):
    found = {
        name: [types.SimpleNamespace(family=socket.AF_INET, address=a) for a in addresses]
        for name, addresses in interfaces.items()
    }
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)


def test_each_host_takes_its_own_address_of_a_network_or_an_interface(monkeypatch):
    addresses_of(monkeypatch, lo=["127.0.0.1"], ib0=["10.1.0.7"], eth0=["10.2.0.7", "10.3.0.7"])
    assert own_address("10.1.0.0/16") == own_address("ib0") == own_address("10.0.0.0/15")
    assert own_address("10.3.0.0/24") == "10.3.0.7"
    assert own_address("10.2.0.7/32") == "10.2.0.7"
    assert own_address("127.0.0.1") == "127.0.0.1"
    for listen, why in {
        "10.0.0.0/8": "this host has several IPv4 addresses in that network: 10.1.0.7, 10.2.0.7",
        "192.168.0.0/16": "this host has no IPv4 address in that network",
        "eth0": "this host has several IPv4 addresses on that interface: 10.2.0.7, 10.3.0.7",
        "ib1": "this host has no such interface",
        "198.51.100.7": "Cannot assign requested address",
    }.items():
        with pytest.raises(ValueError, match=why):
            own_address(listen)


def test_a_filter_takes_many_hosts_and_says_when_it_takes_no_more():
    before = listening()
    with socket.create_server(("0.0.0.0", 0)) as door:
        gate = Gate("127.0.0.1", before)
        hosts = [str(ipaddress.IPv4Address("198.18.0.1") + n) for n in range(MOST_HOSTS)]
        gate.admit(hosts[:-1])
        wanted = [("tcp", "127.0.0.1", door.getsockname()[1])]
        assert attempts(wanted) == [None]
        with pytest.raises(OSError, match="more than"):
            gate.admit(hosts)
        assert attempts(wanted) == [None]
        gate.close()


def test_a_connection_that_is_aborted_sends_nothing_more():
    with socket.create_server(("127.0.0.1", 0)) as door:
        one = socket.create_connection(door.getsockname())
        there, _ = door.accept()
        others = socket.create_connection(door.getsockname()), door.accept()[0]
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # Until both kernels are full.
                one.send(bytes(1 << 20))
        port = door.getsockname()[1]
        assert abort_connections("127.0.0.1", {port + 1}) == 0
        assert abort_connections("127.0.0.2", {port}) == 0
        assert abort_connections("127.0.0.1", {port}) == 2
        there.settimeout(20)

        def drain():
            while there.recv(1 << 20):
                pass

        with pytest.raises(ConnectionResetError):
            drain()
        for each in (one, there, *others):
            each.close()


@pytest.fixture
def shut_door():
    """A listening socket that drops what comes from 127.0.0.1, and its gate."""
    before = listening()
    with socket.create_server(("127.0.0.2", 0)) as door:
        gate = Gate("127.0.0.2", before)
        yield door, gate
        gate.close()


def test_a_connection_that_is_being_made_is_aborted(shut_door):
    door, _ = shut_door
    host, port = door.getsockname()
    with socket.socket() as one:
        one.setblocking(False)
        assert one.connect_ex((host, port)) == errno.EINPROGRESS
        assert abort_connections(host, {port}) == 1
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        assert abort_connections(host, {port}) == 0


def test_a_thread_that_waits_for_a_connection_goes_on_when_that_is_aborted(shut_door):
    door, _ = shut_door
    host, port = door.getsockname()
    with socket.socket() as one, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.connect_ex, (host, port))
        deadline = time.monotonic() + 20
        while abort_connections(host, {port}) == 0:
            assert time.monotonic() < deadline
        assert waiting.result(20) != 0


def test_what_a_host_has_connected_is_aborted(shut_door):
    door, gate = shut_door
    hosts = [f"127.0.0.{n}" for n in (1, 3)]
    gate.admit(hosts)
    connected = [
        socket.create_connection(door.getsockname(), 20, (host, 0)) for host in (*hosts, hosts[0])
    ]
    accepted = [door.accept()[0] for _ in connected]
    for one in connected:
        one.send(b"unread")
    assert gate.abort("127.0.0.1") == 2
    for one in (connected[0], connected[2]):
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    for one in (accepted[0], accepted[2]):
        with pytest.raises(ConnectionResetError):
            one.recv(100)
    assert accepted[1].recv(100) == b"unread"
    for one in (*connected, *accepted):
        one.close()


def test_a_number_that_is_no_socket_any_more_is_left_alone(monkeypatch, tmp_path):
    with (tmp_path / "file").open("w") as file:
        address = types.SimpleNamespace(ip="127.0.0.2", port=9)
        seen = types.SimpleNamespace(
            fd=file.fileno(), laddr=address, raddr=address, status="ESTABLISHED"
        )
        monkeypatch.setattr("psutil.Process.net_connections", lambda process, kind: [seen])
        before = os.listdir("/proc/self/fd")
        assert abort_connections("127.0.0.2", {9}) == 0
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_who_came_before_the_door_was_shut_stops_the_start():
    before = listening()
    with socket.create_server(("0.0.0.0", 0)) as door:
        with (
            socket.create_connection(("127.0.0.2", door.getsockname()[1])),
            pytest.raises(OSError, match=r"127\.0\.0\.2 came before"),
        ):
            Gate("127.0.0.1", before)
        door.accept()[0].close()


def test_a_landing_in_shared_memory_is_its_users_alone():
    here = transport.make("shm", 4096, 4096)
    path = here.address.partition("#")[0]
    assert attempts([("open", path)]) == [None]
    assert attempts([("open", path)], user=NOBODY) == ["Permission denied"]


def test_a_landing_of_another_host_is_not_taken_for_a_file_of_this_one(tmp_path):
    """There the same process and number stand for something else here."""
    here, peer = (transport.make("shm", 4096, 4096) for _ in range(2))
    victim = (tmp_path / "file").open("w+b")
    victim.write(bytes(8192))
    victim.flush()
    process, name = here.address.rpartition("/")[0], here.address.partition("#")[2]
    for number in (victim.fileno(), int(peer.address.rpartition("/")[2].partition("#")[0])):
        with pytest.raises(TransportError, match="not on this host"):
            peer.room(f"{process}/{number}#{name}", 0, 16)
    with pytest.raises(TransportError, match="cannot open"):
        peer.room(f"/proc/{2**22 + 1}/fd/3#{name}", 0, 16)
    assert peer.room(here.address, 0, 16).memory.nbytes == 16
    victim.close()


def test_an_address_of_another_host_stops_the_start(monkeypatch):
    monkeypatch.setattr("pascal_sglang.entrypoints.preflight.problem_with", lambda kind: None)
    config = PascalConfig(kv_transport="mooncake", kv_listen="198.51.100.7", migration="adaptive")
    check_migrations(config, types.SimpleNamespace(dp_size=1))
    with pytest.raises(LaunchError, match=r"--pascal-kv-listen 198\.51\.100\.7: "):
        check_migrations(config, types.SimpleNamespace(dp_size=2))
    # Other hosts find out for themselves.
    check_migrations(config, types.SimpleNamespace(dp_size=2, use_ray=True))
