"""Which address each control socket has when they are open over TCP, and the ways there.

The controller's address is known to all from the start. Every other process listens at a port that
the system chooses, at the address of its host that leads to the controller, and registers it there
until it hears that the controller has it. It asks the controller for the address of another
instance when it first has something to say to it, and is told again when that address changes.
These few messages travel between the others and begin with a byte that MessagePack never uses.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import weakref
from collections import deque
from typing import Annotated, Any

import msgspec
import zmq
from msgspec import Meta

from pascal_sglang import clock
from pascal_sglang.cluster.codec import UNREADABLE
from pascal_sglang.cluster.control_keys import ControlKeys, new_session, own_secret
from pascal_sglang.cluster.messages import Count
from pascal_sglang.config import is_one_address

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
FRONT_END = "http"
# Messages that wait for a slow reader, or for a peer's address, before further ones are dropped.
WAITING = 4096
# Seconds until a question, or a registration, that was not answered is repeated.
REPEAT_S = 1.0

_MARK = b"\xc1"
# An address without a wildcard, a name to look up or an interface.
_ENDPOINT = re.compile(r"tcp://(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})")
_PLACE = re.compile(rf"(?P<endpoint>{_ENDPOINT.pattern})/(?P<session>[0-9a-f]{{32}})")

# A process: an instance by its index, `FRONT_END` or `CONTROLLER`.
Name = str | int
Endpoint = Annotated[str, Meta(max_length=128)]


class _About(msgspec.Struct, frozen=True, tag=True, tag_field="kind", forbid_unknown_fields=True):
    # The process that says it.
    sender: Count | Annotated[str, Meta(max_length=16)]
    # The process that it is about.
    name: Count | Annotated[str, Meta(max_length=16)]


class ListensAt(_About, frozen=True):
    """Process to controller: where it listens. Controller to process: it knows where that one
    listens, which may be itself."""

    endpoint: Endpoint


class AddressQuery(_About, frozen=True):
    """Instance to controller: where does that one listen?"""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(ListensAt | AddressQuery)


def tcp_place(address: str) -> str:
    """A place for the controller to listen at, at any port of an address of this host. The one with
    the port is then `ControlReceiver.place`."""
    return f"{endpoint_at(str(ipaddress.ip_address(address)), 0)}/{new_session()}"


def is_tcp(place: str) -> bool:
    return place.startswith("tcp://")


def endpoint_at(address: str, port: int) -> str:
    """ZeroMQ's name of a port; 0 is any that is free."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def host_of(endpoint: str) -> str:
    """The address in it. Raises: ValueError for no endpoint."""
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        raise ValueError("no endpoint")
    return found["six"] or found["four"]


def _can_be_met(endpoint: str) -> bool:
    """Whether one can connect to it. Raises: ValueError for no endpoint."""
    port = int(endpoint.rpartition(":")[2])
    return is_one_address(host_of(endpoint)) and 0 < port < 1 << 16


def _is_peer(name: Name, instances: int) -> bool:
    """Whether it names another process than the controller."""
    return name < instances if isinstance(name, int) else name == FRONT_END


def address_towards(peer: str) -> str:
    """The address of this host from which packets to `peer` leave; nothing is sent. Raises: OSError
    without a way there."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


class Peers:
    """The TCP sockets of one process of a session: the one where it listens, and those to others.
    name: of this process."""

    def __init__(self, place: str, name: Name) -> None:
        """Raises: LaunchError without the session's secret, ValueError for a place of no such
        form."""
        found = _PLACE.fullmatch(place)
        if found is None:
            raise ValueError("no place of control sockets")
        self.name = name
        self.keys = ControlKeys(own_secret(), found["session"])
        # Where this process listens; empty if it does not.
        self.endpoint = ""
        self._controller = found["endpoint"]
        self._registered_at = float("-inf")
        self._registered = name == CONTROLLER
        self._endpoints: dict[Name, str] = {CONTROLLER: self._controller}
        self._sockets: dict[Name, zmq.Socket[bytes]] = {}
        # Messages for peers whose address is not known yet, and when that was last asked for.
        self._held: dict[Name, deque[bytes]] = {}
        self._asked_at: dict[Name, float] = {}
        # In the controller: who has asked for an address.
        self._askers: dict[Name, set[Name]] = {}

    def listen(self, listener: zmq.Socket[bytes]) -> str:
        """Hear others there; the place. Raises: OSError if it cannot listen there."""
        at = self._controller
        if self.name != CONTROLLER:
            at = endpoint_at(address_towards(host_of(at)), 0)
        listener.setsockopt(zmq.IPV6, "[" in at)
        listener.bind(at)
        self.endpoint = listener.getsockopt_string(zmq.LAST_ENDPOINT)
        if self.name == CONTROLLER:
            self._controller = self._endpoints[CONTROLLER] = self.endpoint
            _shared[os.getpid(), self.place, self.name] = self
        logger.warning(
            "pascal_sglang: control messages to %s come in over TCP at %s, encrypted, and only "
            "from processes of this server",
            f"instance {self.name}" if isinstance(self.name, int) else f"the {self.name} process",
            self.endpoint.removeprefix("tcp://"),
        )
        # Before anything else that this process says, so that it can be answered.
        self.tick()
        return self.place

    @property
    def place(self) -> str:
        """What the others are to be told."""
        return f"{self._controller}/{self.keys.session}"

    def send(self, to: Name, data: bytes) -> bool:
        """Send, or hold until the peer's address is known; False if it was dropped."""
        if to not in self._endpoints:
            return self._hold(to, data)
        try:
            self._way_to(to).send(data, zmq.NOBLOCK)
        except zmq.ZMQError:  # Its queue is full, or this process has no more file descriptors.
            return False
        return True

    def _hold(self, to: Name, data: bytes) -> bool:
        # The controller has nobody to ask: the peer registers, or has died.
        if self.name == CONTROLLER:
            return False
        held = self._held.setdefault(to, deque())
        if len(held) >= WAITING:
            return False
        held.append(data)
        self._ask_for(to)
        return True

    def tick(self) -> None:
        """Now and then: repeat what was not answered."""
        if not self._registered and self.endpoint:
            now = clock.now()
            if now - self._registered_at >= REPEAT_S:
                self._registered_at = now
                self._say(CONTROLLER, ListensAt(self.name, self.name, self.endpoint))
        for name in list(self._held):
            self._ask_for(name)

    def hear(self, data: bytes, instances: int) -> bool:
        """Take in a message about addresses; False if it is none."""
        if not data.startswith(_MARK):
            return False
        try:
            said = _DECODER.decode(memoryview(data)[1:])
            if isinstance(said, ListensAt) and not _can_be_met(said.endpoint):
                return False
        except (*UNREADABLE, ValueError):
            return False
        others = (said.name,) if said.sender == CONTROLLER else (said.sender, said.name)
        if (said.sender == CONTROLLER) == (self.name == CONTROLLER) or not all(
            _is_peer(name, instances) for name in others
        ):
            return False
        if self.name == CONTROLLER:
            self._answer(said)
        elif isinstance(said, ListensAt):
            if said.name == self.name:
                self._registered = said.endpoint == self.endpoint
            else:
                self._learn(said.name, said.endpoint)
        return True

    def describe(self) -> dict[str, Any]:
        """Where each process listens, as far as it is known here."""
        return {str(name): at.removeprefix("tcp://") for name, at in self._endpoints.items()}

    def _answer(self, said: ListensAt | AddressQuery) -> None:
        """In the controller."""
        tell = {said.sender}
        if isinstance(said, ListensAt):
            self._learn(said.name, said.endpoint)
            tell |= self._askers.get(said.name, set())
        else:
            self._askers.setdefault(said.name, set()).add(said.sender)
        endpoint = self._endpoints.get(said.name)
        if endpoint is not None:  # Otherwise once it registers.
            for name in tell:
                self._say(name, ListensAt(CONTROLLER, said.name, endpoint))

    def _learn(self, name: Name, endpoint: str) -> None:
        """A peer listens there, and no longer where it did before."""
        if self._endpoints.get(name) != endpoint:
            self._endpoints[name] = endpoint
            if (old := self._sockets.pop(name, None)) is not None:
                old.close()
        self._asked_at.pop(name, None)
        for data in self._held.pop(name, ()):
            self.send(name, data)

    def _ask_for(self, name: Name) -> None:
        now = clock.now()
        if now - self._asked_at.get(name, float("-inf")) >= REPEAT_S:
            self._asked_at[name] = now
            self._say(CONTROLLER, AddressQuery(self.name, name))

    def _say(self, to: Name, said: ListensAt | AddressQuery) -> None:
        self.send(to, _MARK + _ENCODER.encode(said))

    def _way_to(self, to: Name) -> zmq.Socket[bytes]:
        """Raises: zmq.ZMQError."""
        way = self._sockets.get(to)
        if way is None:
            endpoint = self._endpoints[to]
            way = self.keys.connector()
            way.setsockopt(zmq.IPV6, "[" in endpoint)
            way.setsockopt(zmq.SNDHWM, WAITING)
            way.connect(endpoint)
            self._sockets[to] = way
        return way


# One for all senders and the receiver of a process. A controller and a front end may be threads of
# one process; each has its own.
_shared: weakref.WeakValueDictionary[tuple[int, str, Name], Peers] = weakref.WeakValueDictionary()


def peers(place: str, name: Name) -> Peers:
    """Those of this process. Raises: as `Peers`."""
    key = (os.getpid(), place, name)
    found = _shared.get(key)
    if found is None:
        found = Peers(place, name)
        _shared[key] = found
    return found
