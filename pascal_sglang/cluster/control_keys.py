"""Keys of control sockets that are open over TCP: ZeroMQ's own CURVE, whose peers check each other.

All processes of a server have one secret. The launching process draws it and hands it to those that
it starts in their environment, or to Ray's actors as an argument; or it is in a file that the
operator names. It is in no command line and in no log. Of it and of the session, a number that the
controller draws at each start and that is no secret, come two key pairs: that of who listens and
that of who connects. So a process of an earlier start, or of another server with the same file, is
as foreign as any other.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.auth import Authenticator
from zmq.utils import z85

from pascal_sglang.cluster.loop_errors import LoopErrors
from pascal_sglang.config import LaunchError, PascalConfig

SECRET_ENV = "PASCAL_SGLANG_CONTROL_SECRET"
# Of a secret file, in bytes; of a secret that is drawn.
LEAST_BYTES, MOST_BYTES = 32, 4096
SECRET_BYTES = 32
# Sockets of a process: one for each peer that it sends to.
MAX_SOCKETS = 1 << 14
# A peer that does not answer for so long is cut off, and tried again for ever, ever more slowly.
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2000, 5000
CONNECT_TIMEOUT_MS = 2000
RECONNECT_MS, MOST_RECONNECT_MS = 100, 2000
# Whoever connects has so long to show that it knows the keys.
HANDSHAKE_MS = 5000


def problem_with_library() -> str | None:
    """Why this host's ZeroMQ cannot encrypt; None if it can."""
    return None if zmq.has("curve") else "ZeroMQ was built without CURVE"


def hand_out_secret(config: PascalConfig) -> None:
    """In the launching process, before it starts others: draw the secret of this start, if one is
    needed and no file has it."""
    os.environ.pop(SECRET_ENV, None)
    if config.control_listen is not None and config.control_secret is None:
        os.environ[SECRET_ENV] = secrets.token_hex(SECRET_BYTES)


def own_secret() -> bytes:
    """The secret of this process's server. Raises: LaunchError without one."""
    config = PascalConfig.from_env()
    if config is not None and config.control_secret is not None:
        return read_secret(config.control_secret)
    drawn = os.environ.get(SECRET_ENV)
    if not drawn:
        raise LaunchError("the control sockets are open over TCP, and this process has no secret")
    return drawn.encode()


def read_secret(path: str) -> bytes:
    """What is in a secret file. Raises: LaunchError with one line for a file that others can read
    or write, or that is somebody else's."""
    try:
        # Without waiting for a writer, should it be a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise LaunchError(f"--pascal-control-secret {path}: not a file")
            if found.st_uid != os.geteuid():
                raise LaunchError(f"--pascal-control-secret {path}: it belongs to another user")
            if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
                raise LaunchError(
                    f"--pascal-control-secret {path}: its mode is {mode:04o}, and others may not "
                    "read or write it; chmod 0600"
                )
            secret = file.read(MOST_BYTES + 1).strip()
    except OSError as error:
        raise LaunchError(f"--pascal-control-secret {path}: {error.strerror}") from None
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise LaunchError(
            f"--pascal-control-secret {path}: it must hold {LEAST_BYTES} to {MOST_BYTES} bytes, "
            "such as those of: openssl rand -hex 32"
        )
    return secret


def new_session() -> str:
    """The name of a session."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class _Pair:
    public: bytes
    private: bytes

    @classmethod
    def of(cls, secret: bytes, purpose: str) -> _Pair:
        private = z85.encode(hmac.digest(secret, purpose.encode(), "sha256"))
        return cls(zmq.curve_public(private), private)


class ControlKeys:
    """The two key pairs of one session. No `repr` shows them.

    proof: for whoever has the same secret, that this process has it too.
    """

    def __init__(self, secret: bytes, session: str) -> None:
        self.session = session
        self._listener = _Pair.of(secret, f"pascal_sglang control listener {session}")
        self._connector = _Pair.of(secret, f"pascal_sglang control connector {session}")
        self.proof = hmac.digest(secret, f"pascal_sglang proof {session}".encode(), "sha256").hex()
        self._context = _context()
        self._context.authenticator.configure_curve_callback(session, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """What the authenticator asks: may a peer with this public key connect?"""
        return domain == self.session and hmac.compare_digest(key, self._connector.public)

    def has_proof(self, proof: str) -> bool:
        """Whether a process with the same secret says so."""
        return hmac.compare_digest(proof.encode(), self.proof.encode())

    def listener(self) -> zmq.Socket[bytes]:
        """A PULL socket that takes messages of this session's processes alone."""
        socket = self._socket(zmq.PULL)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._listener.private)
        socket.setsockopt(zmq.ZAP_DOMAIN, self.session.encode())
        # Without the authenticator's word, nobody connects.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        return socket

    def connector(self) -> zmq.Socket[bytes]:
        """A PUSH socket that sends to this session's processes alone."""
        socket = self._socket(zmq.PUSH)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._listener.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._connector.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._connector.private)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, MOST_RECONNECT_MS)
        return socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        # Both sides ask, so each of them notices by itself that the other one is gone.
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket


class _Context(zmq.Context[zmq.Socket[bytes]]):
    """A context of our own: its authenticator has no say in SGLang's sockets."""

    # Of this class; otherwise `instance` finds that of its base.
    _instance = None
    authenticator: Authenticator


_lock = threading.Lock()


def _context() -> _Context:
    with _lock:
        context = _Context.instance()
        if "authenticator" not in vars(context):
            context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            authenticator = Authenticator(context)
            authenticator.start()
            vars(context)["authenticator"] = authenticator
            threading.Thread(
                target=_authenticate, args=(authenticator,), name="control_zap", daemon=True
            ).start()
        return context


def _authenticate(authenticator: Authenticator) -> None:
    """Answer for as long as the process lives. `ThreadAuthenticator` of pyzmq does the same, and in
    a forked process, or at the interpreter's end, it waits for its thread without end."""
    errors, asks = LoopErrors(), authenticator.zap_socket
    with asyncio.Runner() as runner, suppress(zmq.ZMQError):  # The context is closed.
        while True:
            asked = asks.recv_multipart()
            with errors.kept("letting a process connect"):
                runner.run(authenticator.handle_zap_message(asked))
            # It takes no further question before this one is answered: ZeroMQ's RFC 27, ZAP.
            if asks.poll(0, zmq.POLLOUT):
                request = asked[1] if len(asked) > 1 else b""
                asks.send_multipart([b"1.0", request, b"500", b"error", b"", b""])
