"""SGLang's sockets and files of an instance on another host: real sockets, on one host."""

import os
import threading
import time
import uuid
from dataclasses import dataclass

import pytest
import zmq
from sglang.srt.managers.load_snapshot import (
    LoadSnapshot,
    ShmLoadSnapshotReader,
    ShmLoadSnapshotWriter,
    shm_path_for,
)

from pascal_sglang.cluster import remote_channels
from pascal_sglang.cluster.control_keys import SECRET_ENV, ControlKeys, own_secret
from pascal_sglang.cluster.forecast_files import FOLDER_ENV
from pascal_sglang.cluster.remote_channels import (
    METRICS_ENV,
    HeadChannels,
    InstanceChannels,
    Loads,
    Shown,
    connect,
)
from pascal_sglang.cluster.transport.listening import abort_connections
from pascal_sglang.cluster.worker_sender import WorkerSender
from pascal_sglang.config import LaunchError

ADDRESS = "127.0.0.1"
METRICS = b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"12345678"


@dataclass(frozen=True)
class Ports:
    """Those of SGLang's that are used."""

    tokenizer_ipc_name: str
    detokenizer_ipc_name: str
    instance_id: str
    scheduler_input_ipc_name: str = ""
    rpc_ipc_name: str = ""
    metrics_ipc_name: str = ""


def bound(kind, endpoint):
    one = zmq.Context.instance().socket(kind)
    one.setsockopt(zmq.LINGER, 0)
    one.bind(endpoint)
    return one


def connected(kind, endpoint):
    one = zmq.Context.instance().socket(kind)
    one.setsockopt(zmq.LINGER, 0)
    one.connect(endpoint)
    return one


def take(one, timeout_ms=60_000):
    return one.recv() if one.poll(timeout_ms) else None


def wait(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def ended():
    """Set once the process of the instance would have ended."""
    return threading.Event()


@pytest.fixture
def link(monkeypatch, tmp_path, ended):
    """Both ends, SGLang's sockets of the server's host, and its two folders."""
    monkeypatch.setenv(SECRET_ENV, "s" * 64)
    folders = {METRICS_ENV: tmp_path / "metrics", FOLDER_ENV: tmp_path / "forecasts"}
    for variable, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(variable, str(folder))
    ports = Ports(f"ipc://{tmp_path}/t", f"ipc://{tmp_path}/d", f"test{uuid.uuid4().hex[:8]}")
    sockets = [bound(zmq.PULL, p) for p in (ports.tokenizer_ipc_name, ports.detokenizer_ipc_name)]
    monkeypatch.setattr("pascal_sglang.instances.instance_count", lambda: 2)
    head = HeadChannels(ControlKeys(own_secret(), "a" * 32), ADDRESS, 1, ports)
    far = InstanceChannels(head.endpoints, ports, ended.set)
    theirs = {variable: os.environ[variable] for variable in folders}
    monkeypatch.setattr(remote_channels, "LOOK_S", 0.02)
    yield head, far, sockets, folders, theirs
    head.close()
    for one in sockets:
        one.close()


def test_messages_come_through_in_order(link):
    head, far, (tokenizer, detokenizer), _, _ = link
    keys = ControlKeys(own_secret(), head.endpoints.session)
    requests = connect(keys, far.requests_at, head.close)
    scheduler = connected(zmq.PULL, far.port_args.scheduler_input_ipc_name)
    to_tokenizer = connected(zmq.PUSH, far.port_args.tokenizer_ipc_name)
    to_detokenizer = connected(zmq.PUSH, far.port_args.detokenizer_ipc_name)
    for i in range(2000):
        requests.send(b"r%d" % i)
        to_tokenizer.send(b"t%d" % i)
        to_detokenizer.send(b"d%d" % i)
    for name, one in ((b"r", scheduler), (b"t", tokenizer), (b"d", detokenizer)):
        assert [take(one) for _ in range(2000)] == [name + b"%d" % i for i in range(2000)]
    big = os.urandom(8 << 20)
    to_tokenizer.send(big)
    assert take(tokenizer) == big
    head.close()
    wait(lambda: not any(t.name == "channels_of_instance_1" for t in threading.enumerate()))
    to_tokenizer.send(b"from an instance that was given up")
    assert take(tokenizer, 300) is None
    for one in (requests, scheduler, to_tokenizer, to_detokenizer):
        one.close()


@pytest.mark.parametrize("secret", ["another secret, as long as one has to be", None])
def test_a_stranger_is_not_heard(link, secret):
    head, far, (tokenizer, _), _, _ = link
    scheduler = connected(zmq.PULL, far.port_args.scheduler_input_ipc_name)
    for endpoint, one in ((head.endpoints.tokenizer, tokenizer), (far.requests_at, scheduler)):
        if secret is None:
            stranger = connected(zmq.PUSH, endpoint)
        else:
            keys = ControlKeys(secret.encode(), head.endpoints.session)
            stranger = connect(keys, endpoint, head.close)
        stranger.send(b"a pickle")
        assert take(one, 500) is None
        stranger.close()
    scheduler.close()


def test_figures_that_an_instance_shows_are_shown_here(link):
    head, far, _, folders, theirs = link
    with open(os.path.join(theirs[METRICS_ENV], "counter_77.db"), "wb") as file:
        file.write(METRICS + b"unused")
    with open(os.path.join(theirs[FOLDER_ENV], "forecast-1.json"), "wb") as file:
        file.write(b"{}")
    path = shm_path_for(far.port_args.instance_id)
    writer = ShmLoadSnapshotWriter(path, 2, 1)
    writer.write(LoadSnapshot(dp_rank=1, num_running_reqs=7))
    far.show(1, 2, speaks=True)
    here = folders[METRICS_ENV] / "counter_i1p77.db"
    wait(lambda: here.exists() and here.read_bytes() == METRICS)
    wait(lambda: (folders[FOLDER_ENV] / "forecast-1.json").exists())
    wait(lambda: not os.path.exists(path))
    loads = ShmLoadSnapshotReader(head._loads_at, 2)
    writer.write(LoadSnapshot(dp_rank=1, num_running_reqs=8))
    wait(lambda: (s := loads.read(1)) is not None and s.num_running_reqs == 8)
    os.unlink(head._loads_at)


def test_each_of_two_instances_on_one_host_shows_its_load(link):
    """SGLang gives both the same name of a file, which goes once it is open."""
    head, far, _, _, _ = link
    ports = head.port_args
    other_head = HeadChannels(ControlKeys(own_secret(), "a" * 32), ADDRESS, 0, ports)
    other = InstanceChannels(other_head.endpoints, ports, lambda: None)
    # Another file than theirs, as on another host.
    head._loads_at = other_head._loads_at = shm_path_for(f"head{ports.instance_id}")
    reader = ShmLoadSnapshotReader(head._loads_at, 2)
    for one, index in ((far, 1), (other, 0)):
        writer = ShmLoadSnapshotWriter(shm_path_for(one.port_args.instance_id), 2, index)
        writer.write(LoadSnapshot(dp_rank=index, num_running_reqs=7 + index))
        # Whoever shows files already looks at them meanwhile.
        time.sleep(10 * remote_channels.LOOK_S)
        one.show(index, 2, speaks=True)
        wait(lambda i=index: (s := reader.read(i)) is not None and s.num_running_reqs == 7 + i)
    assert not os.path.exists(shm_path_for(ports.instance_id))
    other_head.close()
    os.unlink(head._loads_at)


def says(head, data):
    """A process of the session says that among the figures."""
    one = ControlKeys(own_secret(), head.endpoints.session).connector()
    one.connect(head.endpoints.files)
    one.send(data)
    return one


def test_a_name_that_leads_elsewhere_is_not_written(link, tmp_path):
    head, _, _, folders, _ = link
    names = ["../evil.json", "a/b.db", "", ".", "..", ".hidden", "x" * 200]
    said = [
        says(head, remote_channels._ENCODER.encode(Shown(metrics, name, b"{}")))
        for name in names
        for metrics in (False, True)
    ]
    wait(lambda: head.error_counts() == {"what an instance shows": 2 * len(names)})
    for one in said:
        one.close()
    assert [list(folder.iterdir()) for folder in folders.values()] == [[], []]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != "") == []


# Bytes of no message, of one that is not for here, and of one whose end Python does not reach.
DEEP = b"\x82\xa4type\xa5Loads\xa8snapshot\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"
BAD = {
    "nothing": b"",
    "no message": b"\xc1",
    "too deep": DEEP,
    "another instance's": remote_channels._ENCODER.encode(Loads(LoadSnapshot(dp_rank=0))),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_no_message_ends_what_is_heard(link, data):
    head, far, (tokenizer, _), folders, _ = link
    one = says(head, data)
    wait(lambda: head.error_counts() == {"what an instance shows": 1})
    one.send(remote_channels._ENCODER.encode(Shown(False, "after.json", b"{}")))
    wait(lambda: (folders[FOLDER_ENV] / "after.json").exists())
    one.close()
    to_tokenizer = connected(zmq.PUSH, far.port_args.tokenizer_ipc_name)
    to_tokenizer.send(b"after")
    assert take(tokenizer) == b"after"
    to_tokenizer.close()
    assert not head.ended


def test_what_fails_at_the_instance_is_counted_here_and_the_rest_goes_on(link, monkeypatch):
    head, far, _, folders, theirs = link
    with open(os.path.join(theirs[FOLDER_ENV], "forecast-1.json"), "wb") as file:
        file.write(b"{}")
    monkeypatch.setattr(far, "_show_loads", lambda *_: 1 // 0)
    path = shm_path_for(far.port_args.instance_id)
    ShmLoadSnapshotWriter(path, 2, 1)
    far.show(1, 2, speaks=True)
    wait(lambda: (folders[FOLDER_ENV] / "forecast-1.json").exists())
    wait(lambda: head.error_counts()["showing figures of load"] > 1)
    os.unlink(path)


def reset(endpoint):
    """As a firewall does that has lost its state. Returns: how many connections."""
    return abort_connections(ADDRESS, [int(endpoint.rpartition(":")[2])])


@pytest.mark.parametrize("way", ["tokenizer", "detokenizer"])
def test_an_instance_whose_tokens_may_be_lost_ends(link, ended, way):
    """Nobody would miss them: the text goes on after a gap."""
    head = link[0]

    def ends():  # A connection that had not been made yet has lost nothing.
        reset(getattr(head.endpoints, way))
        return ended.wait(0.1)

    wait(ends)


def test_an_instance_ends_with_the_server(link, ended):
    """Or once it was given up: its connections are closed."""
    head, far, (tokenizer, detokenizer), _, _ = link
    for name, one in (("tokenizer", tokenizer), ("detokenizer", detokenizer)):
        sender = connected(zmq.PUSH, getattr(far.port_args, f"{name}_ipc_name"))
        sender.send(b"while it serves")
        assert take(one) == b"while it serves"
        sender.close()
    assert not ended.is_set()
    head.close()
    assert ended.wait(60)


def test_an_instance_whose_requests_may_be_lost_is_out_of_reach(link):
    head, far, _, _, _ = link
    keys = ControlKeys(own_secret(), head.endpoints.session)
    requests = connect(keys, far.requests_at, head.close)
    scheduler = connected(zmq.PULL, far.port_args.scheduler_input_ipc_name)
    requests.send(b"one")
    assert take(scheduler) == b"one"
    assert not head.ended
    assert reset(far.requests_at)
    wait(lambda: head.ended)
    for one in (requests, scheduler):
        one.close()


def test_a_connection_is_watched_until_its_socket_is_closed(link):
    """Else a thread of all sockets waits without end to say so, and none is closed any more: an
    instance goes on that was given up."""
    head, far, _, _, _ = link
    broken, before = threading.Event(), set(threading.enumerate())
    sender = connect(ControlKeys(own_secret(), head.endpoints.session), far.requests_at, broken.set)
    (watch,) = set(threading.enumerate()) - before

    def breaks():  # A connection that had not been made yet is made again.
        reset(far.requests_at)
        return broken.wait(0.1)

    wait(breaks)
    # It would end at once.
    watch.join(0.5)
    assert watch.is_alive()
    sender.close()
    watch.join(60)
    assert not watch.is_alive()


def test_senders_that_are_left_to_the_collector_hold_up_no_other_socket(link, ended):
    head, far, _, _, _ = link
    keys = ControlKeys(own_secret(), head.endpoints.session)
    for _ in range(10):
        broken = threading.Event()
        left = connect(keys, far.requests_at, broken.set)
        wait(lambda broken=broken: reset(far.requests_at) and broken.wait(0.1))
        del left
    head.close()
    assert ended.wait(60)


def test_a_thread_that_fails_leaves_the_instance_out_of_reach(link):
    head, far, _, _, _ = link
    head._forwarded.clear()
    to_tokenizer = connected(zmq.PUSH, far.port_args.tokenizer_ipc_name)
    to_tokenizer.send(b"to nobody")
    wait(lambda: head.ended)
    to_tokenizer.close()


def test_a_host_with_another_secret_says_so(link, monkeypatch):
    head, far, _, _, _ = link
    monkeypatch.setenv(SECRET_ENV, "t" * 64)
    with pytest.raises(LaunchError, match="this host has another secret than the server"):
        InstanceChannels(head.endpoints, far.port_args, lambda: None)


def test_a_metric_file_that_has_only_just_been_made_is_not_shown(tmp_path):
    """Its head would be missing, with which `prometheus_client` cannot do."""
    fresh = tmp_path / "counter_1.db"
    fresh.touch()
    with pytest.raises(OSError, match="only just been made"):
        remote_channels._bytes_of(fresh)


def test_a_request_that_an_instance_would_not_take_is_refused(monkeypatch, link):
    monkeypatch.setattr(remote_channels, "MAX_MESSAGE_BYTES", 1000)
    head, far, _, _, _ = link
    keys = ControlKeys(own_secret(), head.endpoints.session)
    sender = WorkerSender(connect(keys, far.requests_at, head.close))
    scheduler = connected(zmq.PULL, far.port_args.scheduler_input_ipc_name)
    with pytest.raises(ValueError, match="1001 bytes of one request are more than the 1000"):
        sender.send(bytes(1001))
    sender.send(bytes(1000))
    assert take(scheduler) == bytes(1000)
    scheduler.close()
