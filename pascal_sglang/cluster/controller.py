"""Our data-parallel controller: SGLang's, event-driven, placing requests by phase.

SGLang's polls its socket without ever waiting and keeps a core busy; this one sleeps until there is
something to do. It hears how the instances are over a socket of its own and sends a new request
where Algorithm 1 says (`policy.placement`), unless SGLang's own balancing was asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import sock_recv, sock_send

from pascal_sglang.cluster.monitor import Monitor
from pascal_sglang.cluster.prefixes import Prefixes
from pascal_sglang.cluster.status import MONITOR_ENV
from pascal_sglang.config import PascalConfig
from pascal_sglang.frontend import handed_on, require_same_config
from pascal_sglang.policy.placement import Placement

logger = logging.getLogger(__name__)

# The watchdog wants to be fed now and then.
WAKE_MS = 1000


class PascalController(DataParallelController):
    """`DataParallelController` under the configuration in `PASCAL_SGLANG_CONFIG`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = PascalConfig.from_env()
        assert config is not None
        self.pascal_config = config
        self._folder = tempfile.TemporaryDirectory(prefix="pascal-")
        address = f"ipc://{Path(self._folder.name) / uuid.uuid4().hex}"
        os.environ[MONITOR_ENV] = address
        super().__init__(*args, **kwargs)
        instances = len(self.workers)
        self.monitor = Monitor(instances)
        self.prefixes = Prefixes()
        self.placement = Placement(
            quantum=config.quantum_tokens,
            lazy=config.policy != "paper",
            adaptive=True,
            predict=config.policy != "paper",
        )
        self.placed: Counter[int] = Counter()
        self.status_socket = self.context.socket(zmq.PULL)
        self.status_socket.setsockopt(zmq.LINGER, 0)
        self.status_socket.bind(address)
        if config.places:
            self.dispatching: Callable[[Any], None] = self.place

    def _record_scheduler_init_infos(self, infos: list[dict[str, Any]]) -> None:
        require_same_config(infos)
        super()._record_scheduler_init_infos(infos)

    def get_init_info(self) -> dict[str, Any]:
        """The controller vouches for its instances towards the launcher."""
        info: dict[str, Any] = handed_on(super().get_init_info())
        return info

    def place(self, req: Any) -> None:
        """Send a new request to the instance that Algorithm 1 chooses."""
        self.hear_all()
        if self.maybe_external_dp_rank_routing(req):
            self._note(req, req.routed_dp_rank)
            return
        active = [self.monitor.instances[i] for i in self._active_workers if self.status[i]]
        if not active:
            raise RuntimeError("no active instance to send a request to")
        ids = req.input_ids or ()
        hits = self.prefixes.hits(ids, getattr(req, "extra_key", None))
        index = self.placement.place(active, len(ids), hits)
        self._note(req, index)
        sock_send(self.workers[index], req)

    def _note(self, req: Any, index: int) -> None:
        ids = req.input_ids or ()
        self.monitor.sent(index, len(ids))
        self.prefixes.sent(index, ids, getattr(req, "extra_key", None))
        self.placed[index] += 1

    def hear_all(self) -> None:
        """Take in every status message that has arrived."""
        while True:
            try:
                self.monitor.hear(self.status_socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def event_loop(self) -> None:
        """Wait for requests and status messages; wake once a second for the watchdog."""
        poller = zmq.Poller()
        poller.register(self.recv_from_tokenizer, zmq.POLLIN)
        poller.register(self.status_socket, zmq.POLLIN)
        while True:
            self.soft_watchdog.feed()
            ready = dict(poller.poll(WAKE_MS))
            if self.status_socket in ready:
                self.hear_all()
            if self.recv_from_tokenizer not in ready:
                continue
            while True:
                try:
                    received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._request_dispatcher(received)
