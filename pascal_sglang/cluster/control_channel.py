"""Sockets between the controller and its instances: one for each. The process that serves HTTP has
one too, once it has asked the controller something.

They have a *place*. It is a private folder, readable by its user alone, that the controller makes;
or, where `--pascal-control-listen` asks for it, the controller's TCP address (`control_peers`). The
controller names it in the environment of the schedulers that it starts. A message to a process that
does not listen is dropped, never waited for.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import zmq

from pascal_sglang.cluster.codec import MAX_HANDOVER_BYTES, BadMessage, pack, unpack
from pascal_sglang.cluster.control_peers import (
    CONTROLLER,
    FRONT_END,
    WAITING,
    Name,
    Peers,
    is_tcp,
    peers,
    tcp_place,
)

__all__ = [
    "CONTROLLER",
    "CONTROL_ENV",
    "FRONT_END",
    "ControlReceiver",
    "ControlSender",
    "tcp_place",
]

# The place; inherited by the schedulers, which the controller starts.
CONTROL_ENV = "PASCAL_SGLANG_CONTROL"


def address_of(folder: str, name: Name) -> str:
    """The address of the control socket of the controller, the front end or an instance."""
    return f"ipc://{os.path.join(folder, str(name))}"


class ControlReceiver:
    """Where one process receives. rejected: what came and was no message, by reason.

    place: what the other processes are told, which name the port that was found for the controller.
    """

    def __init__(self, place: str, name: Name, instances: int) -> None:
        """Raises: zmq.ZMQError where it cannot listen; over TCP also as `Peers`."""
        self.place = place
        self.instances = instances
        self.rejected: Counter[str] = Counter()
        self._peers: Peers | None = peers(place, name) if is_tcp(place) else None
        if self._peers is None:
            self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
            self.socket.setsockopt(zmq.LINGER, 0)
        else:
            self.socket = self._peers.keys.listener()
        self.socket.setsockopt(zmq.RCVHWM, WAITING)
        # Above what `codec` reads, so that oversized messages are counted, not only cut off.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_HANDOVER_BYTES)
        if self._peers is None:
            self.socket.bind(address_of(place, name))
        else:
            self.place = self._peers.listen(self.socket)

    def receive(self) -> list[bytes]:
        """Every message that has arrived, unread."""
        found: list[bytes] = []
        while len(found) < WAITING:
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if self._peers is None or not self._peers.hear(data, self.instances):
                found.append(data)
        if self._peers is not None:
            self._peers.tick()
        return found

    def describe(self) -> dict[str, Any] | None:
        """For `GET /pascal/status`, of sockets that are open over TCP; None in a folder."""
        return None if self._peers is None else self._peers.describe()

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

    def __init__(self, place: str, sender: Name = 0) -> None:
        """sender: this process, with the name that its receiver has. Raises: over TCP, as
        `Peers`."""
        self.place = place
        self.sender = sender if isinstance(sender, int) else 0
        self.dropped = 0
        self._peers: Peers | None = peers(place, sender) if is_tcp(place) else None
        self._sockets: dict[Name, zmq.Socket[bytes]] = {}

    def send(self, to: Name, message: Any) -> bool:
        """Send `message`; False if it was dropped."""
        try:
            data = pack(message, self.sender)
            if self._peers is None:
                self._way_to(to).send(data, zmq.NOBLOCK)
                return True
        except (zmq.Again, TypeError, ValueError, OverflowError):
            self.dropped += 1
            return False
        sent = self._peers.send(to, data)
        self.dropped += not sent
        return sent

    def _way_to(self, to: Name) -> zmq.Socket[bytes]:
        """In a folder."""
        socket = self._sockets.get(to)
        if socket is None:
            socket = zmq.Context.instance().socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, WAITING)
            socket.connect(address_of(self.place, to))
            self._sockets[to] = socket
        return socket
