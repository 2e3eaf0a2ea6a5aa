"""The controller's way to one instance: a socket that is never waited for.

SGLang binds a PUSH socket without a high-water mark for each instance. A send on it blocks for ever
once the instance has died, because a bound PUSH socket without a peer can send to nobody.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import zmq

# Messages kept for an instance that is not connected at the moment; further ones are dropped.
MAX_PENDING = 1 << 16


class WorkerSender:
    """Stands for the PUSH socket to an instance in `DataParallelController.workers`.

    `sock_send` calls `send` or, where SGLang pickles, `send_pyobj`; whatever flags it asks for,
    neither blocks.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        # Of a message, as its peer takes it; -1 for any.
        self._most_bytes = int(socket.getsockopt(zmq.MAXMSGSIZE))
        self._pending: deque[bytes] = deque()
        self._open = True
        # Messages that were dropped: the instance has died, or it has been away for too long.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, data: bytes, flags: int = 0, **_: Any) -> None:
        """Send `data` after what is pending, or keep it. Raises: ValueError for more than the
        instance takes."""
        if 0 <= self._most_bytes < len(data):
            raise ValueError(
                f"{len(data)} bytes of one request are more than the {self._most_bytes} that an "
                "instance on another host takes"
            )
        if not self._open:
            self.dropped += 1
        elif self._pending or not self._sent(data):
            if len(self._pending) < MAX_PENDING:
                self._pending.append(data)
            else:
                self.dropped += 1

    def send_pyobj(self, obj: Any, flags: int = 0, protocol: int = -1, **_: Any) -> None:
        """The same for an object that SGLang sends pickled (`SGLANG_USE_PICKLE_IPC`)."""
        import pickle

        self.send(pickle.dumps(obj, protocol))

    def flush(self) -> None:
        """Send what is pending, as far as that goes without waiting."""
        while self._pending and self._sent(self._pending[0]):
            self._pending.popleft()

    def close(self) -> None:
        """The instance has died: drop everything, from now on too."""
        self.dropped += len(self._pending)
        self._pending.clear()
        self._open = False

    def _sent(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
