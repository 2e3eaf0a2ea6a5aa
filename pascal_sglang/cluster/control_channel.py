"""Sockets between the controller and its instances: one for each, in a private folder. The process
that serves HTTP has one too, once it has asked the controller something.

The controller makes the folder, readable by its user alone, and names it in the environment of the
schedulers that it starts. A message to a process that does not listen is dropped, never waited for.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import zmq

from pascal_sglang.cluster.codec import MAX_HANDOVER_BYTES, BadMessage, pack, unpack

# The folder's address; inherited by the schedulers, which the controller starts.
CONTROL_ENV = "PASCAL_SGLANG_CONTROL_DIR"
CONTROLLER = "controller"
FRONT_END = "http"
# Messages that wait for a slow reader before further ones are dropped.
WAITING = 4096


def address_of(folder: str, name: str | int) -> str:
    """The address of the control socket of the controller, the front end or an instance."""
    return f"ipc://{os.path.join(folder, str(name))}"


class ControlReceiver:
    """Where one process receives. rejected: what came and was no message, by reason."""

    def __init__(self, folder: str, name: str | int, instances: int) -> None:
        self.instances = instances
        self.rejected: Counter[str] = Counter()
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, WAITING)
        # Above what `codec` reads, so that oversized messages are counted, not only cut off.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_HANDOVER_BYTES)
        self.socket.bind(address_of(folder, name))

    def receive(self) -> list[bytes]:
        """Every message that has arrived, unread."""
        found: list[bytes] = []
        while len(found) < WAITING:
            try:
                found.append(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
        return found

    def read(self, data: bytes) -> tuple[int, Any] | None:
        """Sender and message; None, and counted, if it is none."""
        try:
            return unpack(data, self.instances)
        except BadMessage as error:
            self.rejected[str(error)] += 1
            return None


class ControlSender:
    """Writes to others. dropped: messages that nobody could take, or that have no form in
    MessagePack."""

    def __init__(self, folder: str, sender: int = 0) -> None:
        self.folder = folder
        self.sender = sender
        self.dropped = 0
        self._sockets: dict[str | int, zmq.Socket[bytes]] = {}

    def send(self, to: str | int, message: Any) -> bool:
        """Send `message`; False if it was dropped."""
        socket = self._sockets.get(to)
        if socket is None:
            socket = zmq.Context.instance().socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, WAITING)
            socket.connect(address_of(self.folder, to))
            self._sockets[to] = socket
        try:
            socket.send(pack(message, self.sender), zmq.NOBLOCK)
        except (zmq.Again, TypeError, ValueError, OverflowError):
            self.dropped += 1
            return False
        return True
