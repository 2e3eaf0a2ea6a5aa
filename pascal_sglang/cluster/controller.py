"""Our data-parallel controller: SGLang's, event-driven, placing and moving requests by phase.

SGLang's polls its socket without ever waiting and keeps a core busy; this one sleeps until there is
something to do. It hears how the instances are, sends a new request where Algorithm 1 says and
orders moves by Algorithm 2 (`policy.placement`), unless SGLang's own balancing was asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import sock_recv, sock_send

from pascal_sglang.cluster.monitor import Monitor
from pascal_sglang.cluster.mover import Mover
from pascal_sglang.cluster.orders import Boundary, Gone, Over
from pascal_sglang.cluster.post import CONTROLLER, POST_ENV, Box, Pen
from pascal_sglang.cluster.prefixes import Prefixes
from pascal_sglang.cluster.status import Status
from pascal_sglang.config import PascalConfig
from pascal_sglang.handshake import handed_on, require_same_config
from pascal_sglang.policy.placement import Instance, Placement

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
        os.environ[POST_ENV] = self._folder.name
        super().__init__(*args, **kwargs)
        instances = len(self.workers)
        self.box = Box(self._folder.name, CONTROLLER, instances)
        self.pen = Pen(self._folder.name)
        self.monitor = Monitor(instances)
        self.prefixes = Prefixes()
        self.placement = Placement(
            quantum=config.quantum_tokens,
            lazy=config.policy != "paper" and config.migration != "always",
            adaptive=config.migration != "always",
        )
        self.mover = Mover(self.monitor, self.placement, self.pen.write, flood=config.flood > 0)
        self.placed: Counter[int] = Counter()
        if config.places:
            self.dispatching: Callable[[Any], None] = self.place

    def _record_scheduler_init_infos(self, infos: list[dict[str, Any]]) -> None:
        require_same_config(infos)
        super()._record_scheduler_init_infos(infos)

    def get_init_info(self) -> dict[str, Any]:
        """The controller vouches for its instances towards the launcher."""
        info: dict[str, Any] = handed_on(super().get_init_info())
        return info

    def active(self, now: float) -> list[Instance]:
        """Instances that take requests; those that have fallen silent only if there are no others.
        Raises: RuntimeError if there are none."""
        found = [self.monitor.instances[i] for i in self._active_workers if self.status[i]]
        if not found:
            raise RuntimeError("no active instance to send a request to")
        return [i for i in found if not self.monitor.is_silent(i.index, now)] or found

    def place(self, req: Any) -> None:
        """Send a new request to the instance that Algorithm 1 chooses."""
        self.hear_all()
        if self.maybe_external_dp_rank_routing(req):
            self._note(req, req.routed_dp_rank)
            return
        ids = req.input_ids or ()
        hits = self.prefixes.hits(ids, getattr(req, "extra_key", None))
        index = self.placement.place(self.active(time.monotonic()), len(ids), hits)
        self._note(req, index)
        sock_send(self.workers[index], req)

    def _note(self, req: Any, index: int) -> None:
        ids = req.input_ids or ()
        self.monitor.sent(index, len(ids))
        self.prefixes.sent(index, ids, getattr(req, "extra_key", None))
        self.placed[index] += 1

    def hear_all(self) -> None:
        """Take in everything that the instances have said."""
        now = time.monotonic()
        for letter in self.box.letters():
            read = self.box.read(letter)
            if read is not None:
                self._hear(read[1], now)

    def _hear(self, message: Any, now: float) -> None:
        if isinstance(message, Status):
            self.monitor.hear(message, now)
        elif isinstance(message, Boundary):
            self.mover.boundary(message, self.active(now), now)
        elif isinstance(message, Over):
            self.mover.over(message)
        elif isinstance(message, Gone):
            self.prefixes.ended(message.dp_rank, message.blocks)
        else:
            self.box.rejected["not for the controller"] += 1

    def event_loop(self) -> None:
        """Wait for requests and messages; wake once a second for the watchdog."""
        poller = zmq.Poller()
        poller.register(self.recv_from_tokenizer, zmq.POLLIN)
        poller.register(self.box.socket, zmq.POLLIN)
        while True:
            self.soft_watchdog.feed()
            ready = dict(poller.poll(WAKE_MS))
            self.mover.forget_old(time.monotonic())
            if self.box.socket in ready:
                self.hear_all()
            if self.recv_from_tokenizer not in ready:
                continue
            while True:
                try:
                    received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._request_dispatcher(received)
