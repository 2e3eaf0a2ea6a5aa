"""What an instance on another host and SGLang's other processes say to each other.

SGLang's processes talk through Unix sockets and show figures in files of their host; both stay as
they are. Between two hosts, what goes through them is carried over TCP, encrypted and for processes
of one session alone (`control_keys`): requests to the instance, its tokens and answers from it, and
copies of the files in which it shows its metrics, its forecasts and SGLang's figures of load.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq
from sglang.srt.managers.load_snapshot import (
    LoadSnapshot,
    ShmLoadSnapshotReader,
    ShmLoadSnapshotWriter,
    shm_path_for,
)
from zmq.utils.monitor import recv_monitor_message

from pascal_sglang import clock
from pascal_sglang.cluster.control_keys import ControlKeys, own_secret
from pascal_sglang.cluster.control_peers import address_towards, endpoint_at, host_of
from pascal_sglang.cluster.forecast_files import FOLDER_ENV
from pascal_sglang.cluster.loop_errors import LoopErrors
from pascal_sglang.cluster.private_folder import PrivateFolder
from pascal_sglang.config import LaunchError

logger = logging.getLogger(__name__)

METRICS_ENV = "PROMETHEUS_MULTIPROC_DIR"
# Seconds between two looks at what an instance shows, of which every so many-th sends all of it;
# milliseconds in which a closed link ends.
LOOK_S = 0.5
ANEW = 40
WAKE_MS = 200
MAX_FILE_BYTES = 1 << 24
# Of one request, or of the tokens of one pass. Whoever connects can make a listener hold as much
# before it has to show the keys.
MAX_MESSAGE_BYTES = 1 << 30
# No hidden file, and neither this folder nor the one above it.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# Of a metric file, the process that writes it: its number means something on its own host alone.
_PROCESS = re.compile(r"_([0-9]+)\.db$")
# The head of a metric file: how many of its bytes are in use.
_USED_BYTES = 4


@dataclass(frozen=True, slots=True)
class HeadEndpoints:
    """Where the host of the server takes what one instance says, by ZeroMQ's names. session: of
    the control sockets, whose keys these have too. proof: that the server has the same secret."""

    session: str
    proof: str
    tokenizer: str
    detokenizer: str
    files: str


class Shown(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Instance to head: a file that it shows. metrics: or else its forecast."""

    metrics: bool
    name: str
    data: bytes


class Alive(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Instance to head, twice a second, whatever its scheduler does meanwhile. errors: what failed
    there so far, by what was going on."""

    errors: dict[str, int] = {}


class Loads(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Instance to head: its figures of load, which SGLang keeps in shared memory."""

    snapshot: LoadSnapshot


_ENCODER = msgspec.msgpack.Encoder(enc_hook=lambda number: number.item())
_DECODER = msgspec.msgpack.Decoder(Alive | Shown | Loads)


def _patient(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """For what may not be lost: TCP brings what it has taken, however long a link is down, and a
    connection that is given up loses it."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 30_000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    return socket


def _listen(
    listener: zmq.Socket[bytes], address: str, most_bytes: int = MAX_MESSAGE_BYTES
) -> tuple[zmq.Socket[bytes], str]:
    """A socket that listens at a port of `address` from now on, and its endpoint. most_bytes: of a
    message. Raises: zmq.ZMQError."""
    listener.setsockopt(zmq.IPV6, ":" in address)
    listener.setsockopt(zmq.MAXMSGSIZE, most_bytes)
    listener.bind(endpoint_at(address, 0))
    return listener, listener.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(keys: ControlKeys, endpoint: str, on_break: Callable[[], None]) -> zmq.Socket[bytes]:
    """A socket that sends there, and takes whatever it is given. Its `MAXMSGSIZE` is what its peer
    takes. on_break: what follows, in another thread, when its connection breaks: what it was sent
    may be lost then, and nobody would miss it."""
    sender = _patient(keys.connector())
    sender.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    wanted = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
    events = sender.get_monitor_socket(wanted)
    _in_thread("connection", partial(_watch, events, endpoint, on_break), on_break)
    return _connect(sender, endpoint)


def _watch(events: zmq.Socket[bytes], endpoint: str, on_break: Callable[[], None]) -> None:
    # To the last event, though one is enough: for a monitor that nobody reads, or that is closed
    # before its socket, libzmq waits without end, in the thread that closes all sockets.
    made = broken = False
    while (event := recv_monitor_message(events)["event"]) != zmq.EVENT_MONITOR_STOPPED:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            made = True
        elif made and not broken:
            broken = True
            logger.error("pascal_sglang: the connection to %s is broken", endpoint)
            on_break()


def _connect(sender: zmq.Socket[bytes], endpoint: str) -> zmq.Socket[bytes]:
    sender.setsockopt(zmq.SNDHWM, 0)
    sender.setsockopt(zmq.IPV6, "[" in endpoint)
    sender.connect(endpoint)
    return sender


def _local(kind: int, endpoint: str, *, bind: bool) -> zmq.Socket[bytes]:
    """A socket of this host, to SGLang's."""
    one: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    one.setsockopt(zmq.LINGER, 0)
    one.setsockopt(zmq.SNDHWM, 0)
    (one.bind if bind else one.connect)(endpoint)
    return one


class HeadChannels:
    """On the host of the server, in a thread: takes what one instance says.

    Nothing of an instance that was given up comes through once this is closed, should it live on.
    heard_at: when something came last. ended: something may have been lost, either way, or nothing
    comes through any more. errors: of messages that could not be handled.
    """

    def __init__(self, keys: ControlKeys, address: str, instance: int, port_args: Any) -> None:
        """address: of this host, where it listens. port_args: SGLang's, of the instance.
        Raises: zmq.ZMQError if it cannot."""
        self.instance = instance
        self.port_args = port_args
        self._folders = {v: os.environ.get(v) for v in (METRICS_ENV, FOLDER_ENV)}
        self._loads_at = shm_path_for(port_args.instance_id)
        self._loads: ShmLoadSnapshotWriter | None = None
        self.heard_at = clock.now()
        self.ended = False
        self.errors = LoopErrors()
        # What the instance says of its own.
        self._errors_there: dict[str, int] = {}
        tokenizer, tokenizer_at = _listen(_patient(keys.listener()), address)
        detokenizer, detokenizer_at = _listen(_patient(keys.listener()), address)
        # What is lost with a connection is sent again.
        self._files, files_at = _listen(keys.listener(), address, 2 * MAX_FILE_BYTES)
        self.endpoints = HeadEndpoints(
            keys.session, keys.proof, tokenizer_at, detokenizer_at, files_at
        )
        self._forwarded = {
            tokenizer: _local(zmq.PUSH, port_args.tokenizer_ipc_name, bind=False),
            detokenizer: _local(zmq.PUSH, port_args.detokenizer_ipc_name, bind=False),
        }
        self._over = threading.Event()
        ports = (at.rpartition(":")[2] for at in (tokenizer_at, detokenizer_at, files_at))
        logger.warning(
            "pascal_sglang: what instance %d says comes in over TCP at %s, ports %s, encrypted, "
            "and only from processes of this server",
            instance,
            address,
            ", ".join(ports),
        )
        name = f"channels_of_instance_{instance}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """Take nothing more."""
        self.ended = True
        self._over.set()

    def error_counts(self) -> Counter[str]:
        """What failed here and on the host of the instance, by what was going on."""
        return Counter(dict(self.errors.counts)) + Counter(self._errors_there)

    def _run(self) -> None:
        poller = zmq.Poller()
        for listener in (*self._forwarded, self._files):
            poller.register(listener, zmq.POLLIN)
        try:
            while not self._over.is_set():
                for ready, _ in poller.poll(WAKE_MS):
                    if self._over.is_set():
                        break
                    try:
                        data = ready.recv(zmq.NOBLOCK)
                    except zmq.Again:
                        continue
                    self.heard_at = clock.now()
                    if ready is self._files:
                        with self.errors.kept("what an instance shows"):
                            self._show(data)
                    else:
                        # Nothing in it is looked at. A token that is lost would be missed by
                        # nobody, so a socket that fails ends all of this.
                        self._forwarded[ready].send(data, zmq.NOBLOCK)
        except Exception:
            logger.exception("pascal_sglang: instance %d is no longer heard", self.instance)
        finally:
            self.ended = True
            for one in (*self._forwarded, *self._forwarded.values(), self._files):
                one.close()

    def _show(self, data: bytes) -> None:
        """Put what it shows where this host looks for it. What cannot be is shown again later.
        Raises: OSError, ValueError, msgspec.MsgspecError, RecursionError."""
        shown = _DECODER.decode(data)
        if isinstance(shown, Alive):
            self._errors_there = shown.errors
        elif isinstance(shown, Loads):
            self._show_loads(shown.snapshot)
        else:
            self._show_file(shown)

    def _show_file(self, shown: Shown) -> None:
        folder = self._folders[METRICS_ENV if shown.metrics else FOLDER_ENV]
        if folder is None:
            return
        if _NAME.fullmatch(shown.name) is None:
            raise ValueError("no name of a file")
        name = _PROCESS.sub(rf"_i{self.instance}p\1.db", shown.name)
        path = Path(folder, name)
        fresh = path.with_name(f"{name}.new")
        fresh.write_bytes(shown.data)
        fresh.replace(path)

    def _show_loads(self, snapshot: LoadSnapshot) -> None:
        if snapshot.dp_rank != self.instance:
            raise ValueError("another instance's figures")
        if self._loads is None:
            from pascal_sglang.instances import instance_count

            self._loads = ShmLoadSnapshotWriter(self._loads_at, instance_count(), self.instance)
        self._loads.write(snapshot)


def end_process() -> None:
    """End with what this process serves: its requests are answered by those who are left."""
    os.kill(os.getpid(), signal.SIGKILL)


class InstanceChannels:
    """On the host of an instance: its ends of SGLang's sockets, and its folders.

    port_args: SGLang's, with sockets of this host. requests_at: where requests come in. errors: of
    showing files, which the host of the server is told.
    """

    def __init__(
        self, head: HeadEndpoints, port_args: Any, on_end: Callable[[], None] = end_process
    ) -> None:
        """on_end: what follows when something may have been lost, or nothing comes through any
        more. Raises: zmq.ZMQError, OSError if it cannot listen here, or has no way to the server;
        LaunchError if it has another secret."""
        self._keys = ControlKeys(own_secret(), head.session)
        if not self._keys.has_proof(head.proof):
            raise LaunchError(
                "this host has another secret than the server; --pascal-control-secret must name a "
                "file with the same content on all hosts"
            )
        self.errors = LoopErrors()
        self._on_end = on_end
        folder = PrivateFolder().path
        self._folders: dict[str, Path] = {}
        for variable in (METRICS_ENV, FOLDER_ENV):
            if variable in os.environ:
                self._folders[variable] = Path(folder, variable.lower())
                self._folders[variable].mkdir(mode=0o700)
                os.environ[variable] = str(self._folders[variable])

        def here(name: str) -> str:
            return f"ipc://{os.path.join(folder, name)}"

        self.port_args = replace(
            port_args,
            # Instances of one host would share one file of figures of load.
            instance_id=f"{port_args.instance_id}-{os.path.basename(folder)}",
            tokenizer_ipc_name=here("tokenizer"),
            detokenizer_ipc_name=here("detokenizer"),
            scheduler_input_ipc_name=here("requests"),
            rpc_ipc_name=here("rpc"),
            metrics_ipc_name=here("metrics"),
        )
        ours = self.port_args
        listener, self.requests_at = _listen(
            _patient(self._keys.listener()), address_towards(host_of(head.tokenizer))
        )
        for source, sink in (
            (listener, _local(zmq.PUSH, ours.scheduler_input_ipc_name, bind=True)),
            (
                _local(zmq.PULL, ours.tokenizer_ipc_name, bind=True),
                connect(self._keys, head.tokenizer, on_end),
            ),
            (
                _local(zmq.PULL, ours.detokenizer_ipc_name, bind=True),
                connect(self._keys, head.detokenizer, on_end),
            ),
        ):
            _in_thread("channels", partial(zmq.proxy, source, sink), on_end)
        self._files_to = _connect(self._keys.connector(), head.files)
        logger.warning(
            "pascal_sglang: requests come in over TCP at %s, encrypted, and only from processes of "
            "this server",
            self.requests_at.removeprefix("tcp://"),
        )

    def show(self, instance: int, instances: int, *, speaks: bool) -> None:
        """Begin to send the files of this process's folders, and that it lives. speaks: and the
        instance's figures of load."""
        path = shm_path_for(self.port_args.instance_id)
        loads = ShmLoadSnapshotReader(path, instances) if speaks else None
        _in_thread("shown_files", partial(self._show, path, loads, instance), self._on_end)

    def _show(self, path: str, loads: ShmLoadSnapshotReader | None, instance: int) -> None:
        sent: dict[str, bytes] = {}
        pause = threading.Event()
        for turn in itertools.count():
            pause.wait(LOOK_S)
            self._send(Alive(dict(self.errors.counts)))
            if turn % ANEW == 0:
                sent.clear()
            if loads is not None:
                with self.errors.kept("showing figures of load"):
                    self._show_loads(path, loads, instance)
            for variable, folder in self._folders.items():
                with self.errors.kept("showing files"):
                    self._show_folder(folder, metrics=variable == METRICS_ENV, sent=sent)

    def _show_loads(self, path: str, loads: ShmLoadSnapshotReader, instance: int) -> None:
        if (snapshot := loads.read(instance)) is not None:
            self._send(Loads(snapshot))
            with suppress(OSError):  # It has no name any more that a killed process leaves.
                os.unlink(path)

    def _show_folder(self, folder: Path, *, metrics: bool, sent: dict[str, bytes]) -> None:
        """sent: what was sent of each file before."""
        for file in _shown_in(folder):
            with suppress(OSError):
                data = _bytes_of(file)
                if sent.get(str(file)) != data:
                    sent[str(file)] = data
                    self._send(Shown(metrics, file.name, data))

    def _send(self, shown: Alive | Shown | Loads) -> None:
        with suppress(zmq.ZMQError):
            self._files_to.send(_ENCODER.encode(shown), zmq.NOBLOCK)


def _shown_in(folder: Path) -> list[Path]:
    """The files of a folder, but for those that are not whole yet."""
    return sorted(file for file in folder.glob("*") if file.suffix in (".db", ".json"))


def _bytes_of(file: Path) -> bytes:
    """A file, of a metric file the part that is in use. Raises: OSError."""
    data = file.read_bytes()
    if file.suffix == ".db":
        if len(data) < _USED_BYTES:
            raise OSError("it has only just been made")
        data = data[: max(_USED_BYTES, int.from_bytes(data[:_USED_BYTES], "little"))]
    if len(data) > MAX_FILE_BYTES:
        raise OSError("too large to be shown")
    return data


def _in_thread(name: str, work: Callable[[], object], on_error: Callable[[], None]) -> None:
    """on_error: what follows when the work ends with an error."""

    def run() -> None:
        try:
            work()
        except Exception:
            logger.exception("pascal_sglang: the thread %s has ended", name)
            on_error()

    threading.Thread(target=run, name=name, daemon=True).start()
