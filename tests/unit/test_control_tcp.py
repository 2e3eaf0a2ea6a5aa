"""Control sockets over TCP: who is let in, who is not, and what becomes of what it says."""

import errno
import logging
import os
import socket
import stat
import threading
import time
from contextlib import suppress

import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from pascal_sglang.cluster import control_keys, control_peers
from pascal_sglang.cluster.codec import MAX_HANDOVER_BYTES, pack
from pascal_sglang.cluster.control_channel import (
    CONTROLLER,
    FRONT_END,
    ControlReceiver,
    ControlSender,
    tcp_place,
)
from pascal_sglang.cluster.control_keys import SECRET_ENV, hand_out_secret, read_secret
from pascal_sglang.cluster.control_peers import WAITING, ListensAt, address_towards, is_tcp
from pascal_sglang.cluster.messages import CommitAck, ControlAnswered, InstanceDown
from pascal_sglang.config import CONFIG_ENV, ConfigError, LaunchError, PascalConfig
from pascal_sglang.entrypoints.preflight import check_control

BOUND_S = 30
LOOPBACK = "127.0.0.1"
INSTANCES = 3


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    monkeypatch.setenv(SECRET_ENV, "0" * 64)


class Side:
    """The control sockets of one process."""

    def __init__(self, place, name):
        self.receiver = ControlReceiver(place, name, INSTANCES)
        self.place = self.receiver.place
        self.sender = ControlSender(self.place, name)
        self.found = []

    def hear(self):
        for data in self.receiver.receive():
            if (read := self.receiver.read(data)) is not None:
                self.found.append(read)
        return self.found

    @property
    def peers(self):
        return self.receiver._peers

    @property
    def port(self):
        return int(self.peers.endpoint.rpartition(":")[2])


@pytest.fixture
def controller():
    return Side(tcp_place(LOOPBACK), CONTROLLER)


def until(holds, *sides):
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline
        for side in sides:
            side.hear()
        time.sleep(0.001)


def joined(controller, name):
    side = Side(controller.place, name)
    until(lambda: side.peers._registered, controller, side)
    return side


def serves_on(controller):
    """Somebody of the session is heard after all that."""
    before = len(controller.found)
    side = joined(controller, 2)
    side.sender.send(CONTROLLER, ControlAnswered(2, "after"))
    until(lambda: len(controller.found) > before, controller)
    assert controller.found[before:] == [(2, ControlAnswered(2, "after"))]
    assert controller.receiver.rejected == {}


def test_instances_find_the_controller_and_each_other(controller):
    one, other = joined(controller, 0), joined(controller, 1)
    one.sender.send(CONTROLLER, ControlAnswered(0, "a"))
    controller.sender.send(1, InstanceDown(2))
    # Before the address is known, and in order.
    for number in range(3):
        assert one.sender.send(1, CommitAck(str(number)))
    until(lambda: len(other.found) == 4 and controller.found, controller, one, other)
    assert controller.found == [(0, ControlAnswered(0, "a"))]
    from_one = [(0, CommitAck(str(number))) for number in range(3)]
    assert [f for f in other.found if f[0] or isinstance(f[1], CommitAck)] == from_one
    assert (0, InstanceDown(2)) in other.found
    assert one.sender.dropped == other.sender.dropped == controller.sender.dropped == 0
    shown = {"controller": controller, "0": one, "1": other}
    assert controller.receiver.describe() == {n: f"{LOOPBACK}:{s.port}" for n, s in shown.items()}


def test_the_first_question_of_the_http_process_is_answered(controller):
    front_end = Side(controller.place, FRONT_END)
    front_end.sender.send(CONTROLLER, ControlAnswered(0, "question"))
    until(lambda: controller.found, controller)
    assert controller.sender.send(FRONT_END, ControlAnswered(0, "answer"))
    until(lambda: front_end.found, front_end)


def test_what_the_controller_says_to_nobody_is_dropped(controller):
    assert not controller.sender.send(0, InstanceDown(1))
    assert controller.sender.dropped == 1


def test_no_more_is_held_for_a_peer_that_never_comes_than_for_a_slow_one(controller):
    one = joined(controller, 0)
    for _ in range(WAITING):
        assert one.sender.send(1, CommitAck("m"))
    assert not one.sender.send(1, CommitAck("m"))
    assert one.sender.dropped == 1


def test_a_process_without_file_descriptors_drops_and_goes_on(controller, monkeypatch):
    one = joined(controller, 0)

    def none_left():
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(controller.peers.keys, "connector", none_left)
        two = Side(controller.place, 1)  # Its registration is to be answered.
        until(lambda: 1 in controller.peers._endpoints, controller, two)
        assert not controller.sender.send(1, InstanceDown(2))
    assert controller.sender.send(1, InstanceDown(2))
    one.sender.send(CONTROLLER, ControlAnswered(0, "a"))
    until(lambda: controller.found, controller)


def test_a_peer_that_starts_again_is_found_at_its_new_port(controller, monkeypatch):
    monkeypatch.setattr(control_peers, "REPEAT_S", 0.01)
    one, other = joined(controller, 0), joined(controller, 1)
    one.sender.send(1, CommitAck("to the first"))
    until(lambda: other.found, controller, one, other)
    before = other.port
    other.receiver.socket.close()
    again = Side(controller.place, "again")  # Its name is that of a process, not of this one.
    again.peers.name = 1
    again.peers._registered = False
    until(lambda: again.peers._registered, controller, again)
    assert again.port != before
    until(lambda: one.peers._endpoints[1] == again.peers.endpoint, controller, one)
    one.sender.send(1, CommitAck("to the second"))
    controller.sender.send(1, InstanceDown(2))
    until(lambda: len(again.found) == 2, controller, one, again)
    assert {type(message) for _, message in again.found} == {CommitAck, InstanceDown}


def test_a_registration_that_was_lost_is_repeated(controller, monkeypatch):
    monkeypatch.setattr(control_peers, "REPEAT_S", 0.01)
    one = Side(controller.place, 0)
    until(lambda: controller.receiver.socket.poll(0))
    assert controller.receiver.socket.recv().startswith(b"\xc1")  # And nobody reads it.
    until(lambda: one.peers._registered, controller, one)


class Link:
    """A relay to the controller. record: bytes towards it, by connection."""

    def __init__(self, controller):
        self.record = []
        self._to = controller.port
        self._ends = []
        self._cut = threading.Event()
        self._server = socket.create_server((LOOPBACK, 0))
        threading.Thread(target=self._relay, daemon=True).start()
        port = self._server.getsockname()[1]
        self.place = controller.place.replace(f":{controller.port}/", f":{port}/")

    def _relay(self):
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection((LOOPBACK, self._to))
                self._ends += [near, far]
                self.record.append([])
                self._cut = threading.Event()
                self._pump(near, far, self.record[-1])
                self._pump(far, near, [])

    def _pump(self, a, b, record):
        def run(cut):
            with suppress(OSError):
                while (data := a.recv(1 << 16)) and not cut.is_set():
                    record.append(data)
                    b.sendall(data)
                if not cut.is_set():
                    b.shutdown(socket.SHUT_WR)

        threading.Thread(target=run, args=(self._cut,), daemon=True).start()

    def reset(self):
        for end in self._ends:
            with suppress(OSError):  # The pumps have done it.
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """As a cable is: nothing comes through any more, and nobody is told."""
        self._cut.set()

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        for each in (self._server, *self._ends):
            each.close()


@pytest.fixture
def link(controller):
    made = Link(controller)
    yield made
    made.close()


@pytest.mark.parametrize("how", ["reset", "cut"])
def test_a_link_that_breaks_is_made_again(how, monkeypatch):
    monkeypatch.setattr(control_keys, "HEARTBEAT_MS", 20)
    monkeypatch.setattr(control_keys, "HEARTBEAT_TIMEOUT_MS", 100)
    controller = Side(tcp_place(LOOPBACK), CONTROLLER)
    link = Link(controller)
    one, two = joined(controller, 0), Side(link.place, 1)
    until(lambda: two.peers._registered, controller, two)
    two.sender.send(CONTROLLER, ControlAnswered(1, "before"))
    until(lambda: controller.found, controller)
    getattr(link, how)()

    def is_heard_again():
        two.sender.send(CONTROLLER, ControlAnswered(1, "after"))
        return len(controller.found) > 1

    until(is_heard_again, controller)
    # Where a process stands still for longer than the heartbeat's time-out, more than once.
    assert len(link.record) >= 2
    controller.found.clear()
    one.sender.send(CONTROLLER, ControlAnswered(0, "the other one"))
    until(lambda: (0, ControlAnswered(0, "the other one")) in controller.found, controller)
    link.close()


def intruder(port, **options):
    """A socket of somebody else's, whose messages would get there if it were let in."""
    made = zmq.Context.instance().socket(zmq.PUSH)
    made.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        made.setsockopt(getattr(zmq, name), value)
    monitor = made.get_monitor_socket()
    made.connect(f"tcp://{LOOPBACK}:{port}")
    with suppress(zmq.Again):  # It may have been refused by now, which leaves nobody to send to.
        made.send(pack(ControlAnswered(0, "injected")), zmq.NOBLOCK)
    return made, monitor


FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


def is_refused(made, monitor):
    while monitor.poll(BOUND_S * 1000):
        event = recv_monitor_message(monitor)["event"]
        assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
        if event & FAILED:
            made.disable_monitor()
            monitor.close()
            made.close()
            return True
    return False


def keys():
    public, private = zmq.curve_keypair()
    return {"CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": private}


def test_a_foreign_client_is_refused_even_where_it_knows_the_server(controller):
    theirs = controller.peers.keys._listener.public
    assert is_refused(*intruder(controller.port, CURVE_SERVERKEY=theirs, **keys()))
    serves_on(controller)


def test_who_does_not_know_the_server_is_refused(controller):
    ours = controller.peers.keys._connector
    foreign, _ = zmq.curve_keypair()
    known = {"CURVE_PUBLICKEY": ours.public, "CURVE_SECRETKEY": ours.private}
    for own in (keys(), known):
        assert is_refused(*intruder(controller.port, CURVE_SERVERKEY=foreign, **own))
    serves_on(controller)


def test_a_client_without_a_key_is_refused(controller):
    assert is_refused(*intruder(controller.port))
    assert is_refused(*intruder(controller.port, PLAIN_USERNAME=b"a", PLAIN_PASSWORD=b"b"))
    serves_on(controller)


def test_a_process_of_another_start_is_refused(controller):
    place = tcp_place(LOOPBACK).replace(":0/", f":{controller.port}/")
    stray = Side(place, 0)
    stray.sender.send(CONTROLLER, ControlAnswered(0, "injected"))
    monitor = stray.peers._sockets[CONTROLLER].get_monitor_socket()
    assert is_refused(stray.peers._sockets.pop(CONTROLLER), monitor)
    serves_on(controller)


def test_a_client_sends_nothing_to_a_listener_that_does_not_know_the_secret(controller):
    with socket.create_server((LOOPBACK, 0)) as nobody:
        port = nobody.getsockname()[1]
    impostor = zmq.Context.instance().socket(zmq.PULL)
    _, private = zmq.curve_keypair()
    impostor.setsockopt(zmq.CURVE_SERVER, 1)
    impostor.setsockopt(zmq.CURVE_SECRETKEY, private)
    impostor.bind(f"tcp://{LOOPBACK}:{port}")
    side = Side(controller.place.replace(f":{controller.port}/", f":{port}/"), 0)
    way = side.peers._sockets[CONTROLLER]
    monitor = way.get_monitor_socket()
    assert is_refused(side.peers._sockets.pop(CONTROLLER), monitor)
    assert not impostor.poll(0)
    impostor.close()


def say_and_wait(controller, said):
    """Say it to the controller's port, until the controller ends the connection."""
    stranger = socket.create_connection((LOOPBACK, controller.port), timeout=BOUND_S)
    with stranger, suppress(OSError):
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(1 << 16):
            pass


# The greeting of ZMTP 3.1 with the mechanism NULL, of 2.0, of 1.0, and what is nothing of the kind.
GREETING = b"\xff" + bytes(8) + b"\x7f"
PLAIN = (
    GREETING + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32) + b"\x04\x19\x05READY",
    GREETING + b"\x01\x08\x00\x00" + b"\x00\x06inject",
    b"\x01\x00" + b"\x07\x00inject",
    b"GET / HTTP/1.1\r\nHost: controller\r\n\r\n",
    b"\x00" * 512,
    os.urandom(4096),
    # A frame of 2 GiB after a greeting for CURVE, in the place of the first command.
    GREETING
    + b"\x03\x01"
    + b"CURVE".ljust(20, b"\0")
    + bytes(32)
    + b"\x06"
    + (1 << 31).to_bytes(8, "big"),
)


@pytest.mark.parametrize("said", PLAIN, ids=range(len(PLAIN)))
def test_plain_bytes_are_refused(controller, said):
    say_and_wait(controller, said)
    serves_on(controller)


def test_who_says_nothing_is_cut_off(controller, monkeypatch):
    monkeypatch.setattr(control_keys, "HANDSHAKE_MS", 50)
    hasty = Side(tcp_place(LOOPBACK), CONTROLLER)
    with socket.create_connection((LOOPBACK, hasty.port), timeout=BOUND_S) as stranger:
        while stranger.recv(1 << 16):  # The greeting; then the end.
            pass
    serves_on(hasty)


# To those who let processes in, of ZeroMQ: too short to be answered, and not to be decoded.
QUESTIONS = ([b"1.0"], [b"1.0", b"1", b"", b"", b"", b"GSSAPI", b"\xff"])


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_no_question_ends_those_who_let_in(controller, question):
    asks = control_keys._context().socket(zmq.REQ)
    asks.setsockopt(zmq.LINGER, 0)
    asks.connect("inproc://zeromq.zap.01")
    asks.send_multipart(question)
    assert asks.poll(BOUND_S * 1000), "no answer"
    assert asks.recv_multipart()[2] == b"500"
    asks.close()
    serves_on(controller)


def test_recorded_bytes_say_nothing_again(controller, link):
    side = Side(link.place, 0)
    side.sender.send(CONTROLLER, ControlAnswered(0, "once"))
    until(lambda: controller.found, controller)
    (record,) = link.record
    assert b"once" not in b"".join(record)
    # Into the same connection, which ends, and into another one from its beginning on.
    (_, far) = link._ends
    far.sendall(record[-1])
    until(lambda: len(link.record) == 2)
    say_and_wait(controller, b"".join(record))
    assert controller.hear() == [(0, ControlAnswered(0, "once"))]
    controller.found.clear()
    serves_on(controller)


def test_an_oversized_message_of_our_own_ends_its_connection_alone(controller):
    one = joined(controller, 0)
    one.peers._sockets[CONTROLLER].send(bytes(2 * MAX_HANDOVER_BYTES + 1))
    serves_on(controller)


def test_what_is_no_address_is_rejected_and_counted(controller):
    one = joined(controller, 0)
    encode = control_peers._ENCODER.encode
    good = one.peers.endpoint
    bad = [
        b"",
        b"nothing",
        encode(ListensAt(0, 9, good)),
        encode(ListensAt(9, 0, good)),
        encode(ListensAt(CONTROLLER, 0, good)),
        encode(ListensAt(0, CONTROLLER, good)),
        *(
            encode(ListensAt(0, 0, endpoint))
            for endpoint in (
                "tcp://0.0.0.0:1",
                "tcp://[::]:1",
                "tcp://[::ffff:0.0.0.0]:1",
                "tcp://127.0.0.1:0",
                "tcp://127.0.0.1:70000",
                "tcp://host:1",
                "ipc:///tmp/a",
                "inproc://a",
                "tcp://127.0.0.1:1;127.0.0.1:2",
            )
        ),
    ]
    for data in bad:
        one.peers._sockets[CONTROLLER].send(b"\xc1" + data)
    until(lambda: controller.receiver.rejected.total() == len(bad), controller)
    assert controller.peers._endpoints == {CONTROLLER: controller.peers.endpoint, 0: good}


def test_open_sockets_say_so_once_with_their_port(caplog):
    with caplog.at_level(logging.WARNING):
        controller = Side(tcp_place(LOOPBACK), CONTROLLER)
        joined(controller, 0)
    said = [r.getMessage() for r in caplog.records if "over TCP" in r.getMessage()]
    assert len(said) == 2
    assert f"{LOOPBACK}:{controller.port}" in said[0]
    assert os.environ[SECRET_ENV] not in caplog.text


def test_each_listens_at_one_address_alone(controller):
    one = joined(controller, 0)
    listening = {
        seen.laddr.ip
        for seen in psutil.Process().net_connections("tcp")
        if seen.status == "LISTEN" and seen.laddr.port in (controller.port, one.port)
    }
    assert listening == {LOOPBACK}


def test_ipv6_is_served_too():
    try:
        assert address_towards("::1") == "::1"
    except OSError:
        pytest.skip("this host has no IPv6")
    controller = Side(tcp_place("0:0:0:0:0:0:0:1"), CONTROLLER)
    one = joined(controller, 0)
    assert one.peers.endpoint.startswith("tcp://[::1]:")
    serves_on(controller)


def test_without_the_flag_nothing_listens_and_no_secret_is_made(tmp_path, monkeypatch):
    hand_out_secret(PascalConfig())
    assert SECRET_ENV not in os.environ
    assert not is_tcp(str(tmp_path))
    receiver = ControlReceiver(str(tmp_path), CONTROLLER, 2)
    sender = ControlSender(str(tmp_path), 1)
    assert receiver._peers is sender._peers is None
    assert receiver.socket.getsockopt(zmq.MECHANISM) == zmq.NULL
    assert receiver.place == str(tmp_path)
    assert receiver.describe() is None
    assert stat.S_ISSOCK(os.stat(tmp_path / CONTROLLER).st_mode)


def test_a_secret_is_drawn_at_each_start_unless_a_file_has_it(tmp_path):
    drawn = set()
    for _ in range(2):
        hand_out_secret(PascalConfig(control_listen=LOOPBACK))
        drawn.add(os.environ[SECRET_ENV])
    assert len(drawn) == 2
    hand_out_secret(PascalConfig(control_listen=LOOPBACK, control_secret="/a/file"))
    assert SECRET_ENV not in os.environ


def test_without_a_secret_nothing_is_opened(monkeypatch):
    monkeypatch.delenv(SECRET_ENV)
    with pytest.raises(LaunchError, match="has no secret"):
        ControlReceiver(tcp_place(LOOPBACK), CONTROLLER, 2)


def secret_file(tmp_path, content=b"a" * 32, mode=0o600):
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_who_has_the_same_file_is_let_in(tmp_path, monkeypatch):
    monkeypatch.delenv(SECRET_ENV)
    path = secret_file(tmp_path)
    config = PascalConfig(control_listen=LOOPBACK, control_secret=str(path))
    monkeypatch.setenv(CONFIG_ENV, config.to_json())
    controller = Side(tcp_place(LOOPBACK), CONTROLLER)
    joined(controller, 0)
    path.write_bytes(b"b" * 32)
    other = Side(controller.place, 1)
    monitor = other.peers._sockets[CONTROLLER].get_monitor_socket()
    assert is_refused(other.peers._sockets.pop(CONTROLLER), monitor)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_secret_that_others_can_reach_is_refused(tmp_path, mode):
    with pytest.raises(LaunchError, match=f"its mode is {mode:04o}"):
        read_secret(str(secret_file(tmp_path, mode=mode)))


@pytest.mark.parametrize("content", [b"", b"short", b"a" * 5000, b"\n" * 100])
def test_a_secret_of_another_length_is_refused(tmp_path, content):
    with pytest.raises(LaunchError, match="it must hold 32 to 4096 bytes"):
        read_secret(str(secret_file(tmp_path, content)))


def test_a_secret_that_is_no_file_or_not_ones_own_is_refused(tmp_path):
    with pytest.raises(LaunchError, match="No such file"):
        read_secret(str(tmp_path / "none"))
    with pytest.raises(LaunchError, match=r"directory|not a file"):
        read_secret(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(LaunchError, match="not a file"):
        read_secret(str(tmp_path / "pipe"))
    if not os.geteuid():
        path = secret_file(tmp_path)
        os.chown(path, 65534, -1)
        with pytest.raises(LaunchError, match="belongs to another user"):
            read_secret(str(path))


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "::ffff:0.0.0.0", "*", "", "localhost", "224.0.0.1", "ff02::1",
     "255.255.255.255", "127.0.0.1:80", "fe80::1%lo", "10.0.0.0/8"],
)  # fmt: skip
def test_a_wildcard_or_a_name_is_refused(address):
    with pytest.raises(ConfigError, match="control_listen must be one IP address"):
        PascalConfig(control_listen=address)


def test_a_secret_without_an_address_is_refused():
    with pytest.raises(ConfigError, match="control_secret is for control_listen"):
        PascalConfig(control_secret="/a/file")
    for path in ("", "secret", "./secret", "~/secret", "/a\0b"):
        with pytest.raises(ConfigError, match="must be the absolute path of a file"):
            PascalConfig(control_secret=path, control_listen=LOOPBACK)


class Args:
    enable_dp_attention, use_ray = False, False


def test_what_cannot_be_opened_is_refused_at_start(tmp_path):
    check_control(PascalConfig(control_listen=LOOPBACK), Args)
    with pytest.raises(LaunchError, match=r"--pascal-control-listen 198\.51\.100\.7: "):
        check_control(PascalConfig(control_listen="198.51.100.7"), Args)
    wide = str(secret_file(tmp_path, mode=0o644))
    with pytest.raises(LaunchError, match="its mode is 0644"):
        check_control(PascalConfig(control_listen=LOOPBACK, control_secret=wide), Args)
    together = type("Together", (Args,), {"enable_dp_attention": True})
    with pytest.raises(LaunchError, match="does not work with DP attention"):
        check_control(PascalConfig(control_listen=LOOPBACK), together)
