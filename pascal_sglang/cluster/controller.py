"""Our data-parallel controller: SGLang's, event-driven, placing and moving requests by phase.

SGLang's polls its socket without ever waiting and keeps a core busy; this one sleeps until there is
something to do. It hears how the instances are, sends a new request where Algorithm 1 says and
orders moves by Algorithm 2 (`policy.placement`), unless SGLang's own balancing was asked for.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import zmq
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    TokenizedGenerateReqInput,
    sock_recv,
    sock_send,
)
from sglang.srt.runtime_context import get_observability
from sglang.srt.utils.network import get_zmq_socket

from pascal_sglang.cluster.board import Board
from pascal_sglang.cluster.internal_requests import is_health_probe, is_internal
from pascal_sglang.cluster.location_check import LocationCheck
from pascal_sglang.cluster.metrics import ControllerMetrics
from pascal_sglang.cluster.monitor import Monitor
from pascal_sglang.cluster.mover import Mover
from pascal_sglang.cluster.orders import Boundary, Died, Gone, LocationReply, Over
from pascal_sglang.cluster.post import CONTROLLER, POST_ENV, Box, Pen
from pascal_sglang.cluster.prefixes import Prefixes, block_names
from pascal_sglang.cluster.processes import Processes
from pascal_sglang.cluster.residents import Residents
from pascal_sglang.cluster.status import Status
from pascal_sglang.cluster.undertaker import MESSAGE, Undertaker
from pascal_sglang.config import PascalConfig
from pascal_sglang.handshake import INIT_INFO_KEY, handed_on, homes_of, require_same_config
from pascal_sglang.policy.placement import Instance, Placement

# The watchdog wants to be fed now and then.
WAKE_MS = 1000
# How often to look which instances have fallen silent, in seconds.
LOOK_S = 0.2


class PascalController(DataParallelController):
    """`DataParallelController` under the configuration in `PASCAL_SGLANG_CONFIG`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = PascalConfig.from_env()
        assert config is not None
        self.pascal_config = config
        self._folder = tempfile.TemporaryDirectory(prefix="pascal-")
        os.environ[POST_ENV] = self._folder.name
        homes: dict[int, int] = {}
        self._homes = homes
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
            predict=config.policy != "paper",
        )
        self.mover = Mover(self.monitor, self.placement, self.pen.write, flood=config.flood > 0)
        self._active: list[Instance] = []
        self._active_at = -math.inf
        self.placed: Counter[str] = Counter()
        self._probes = 0
        self.residents = Residents()
        self.undertaker = Undertaker(self.residents, self.mover, self._fail)
        self.locations = LocationCheck(self.residents, self.pen.write, self.mover.moving)
        self.processes = Processes(self.schedulers() if config.places else [], homes)
        self.board = Board(self._folder.name)
        reports = get_observability().enable_metrics
        model = str(self.server_args.served_model_name)
        self.metrics = ControllerMetrics(model) if reports else None
        self.to_tokenizer = get_zmq_socket(
            self.context, zmq.PUSH, self.port_args.tokenizer_ipc_name, False
        )
        if config.places:
            self.processes.outlive_schedulers()
            self.dispatching: Callable[[Any], None] = self.place

    def schedulers(self) -> list[Any]:
        """The processes that were started, with `pid`, `sentinel` and `exitcode`."""
        return list(self.scheduler_procs)

    def launch_tensor_parallel_group(
        self, server_args: Any, port_args: Any, base_gpu_id: int, *args: Any, **kwargs: Any
    ) -> None:
        """Start an instance; where GPUs are shared, on the one whose turn it is."""
        if (gpus := self.pascal_config.gpus) is not None:
            base_gpu_id = server_args.base_gpu_id + (base_gpu_id - server_args.base_gpu_id) % gpus
        super().launch_tensor_parallel_group(server_args, port_args, base_gpu_id, *args, **kwargs)

    def _record_scheduler_init_infos(self, infos: list[dict[str, Any]]) -> None:
        require_same_config(infos)
        self._homes.update(homes_of(infos))
        super()._record_scheduler_init_infos(infos)

    def get_init_info(self) -> dict[str, Any]:
        """The controller vouches for its instances towards the launcher."""
        self.board.show(time.monotonic(), self.describe)
        info: dict[str, Any] = handed_on(super().get_init_info(), self.board.path)
        return info

    def init_dispatcher(self) -> None:
        super().init_dispatcher()
        self._request_dispatcher._mapping[GetInternalStateReq] = self.ask_states

    def ask_states(self, req: Any) -> None:
        """Every instance answers, and for those that have died this controller does."""
        self.send_control_message(req)
        for index in self.undertaker.dead:
            state = {INIT_INFO_KEY: {"dp_rank": index, "dead": True}}
            sock_send(self.to_tokenizer, GetInternalStateReqOutput(internal_state=state))

    def active(self) -> list[Instance]:
        """Instances that take requests; those that have fallen silent only if there are no others.
        Raises: RuntimeError if there are none."""
        now = time.monotonic()
        if now - self._active_at < LOOK_S:
            return self._active
        found = [self.monitor.instances[i] for i in self._active_workers if self.status[i]]
        if not found:
            raise RuntimeError("no active instance to send a request to")
        self._active = [i for i in found if not self.monitor.is_silent(i.index, now)] or found
        self._active_at = now
        return self._active

    def place(self, req: Any) -> None:
        """Send a new request to the instance that Algorithm 1 chooses; a health probe to each in
        turn, uncounted, because a busy instance drops it and says nothing."""
        self.hear_all()
        if is_health_probe(req):
            active = self.active()
            self._probes += 1
            sock_send(self.workers[active[self._probes % len(active)].index], req)
            return
        blocks = list(block_names(req.input_ids or (), getattr(req, "extra_key", None)))
        if self.maybe_external_dp_rank_routing(req):
            self._note(req, req.routed_dp_rank, blocks)
            return
        hits = self.prefixes.hits(blocks)
        candidates = self.placement.in_sight(self.active(), hits)
        index = self.placement.place(candidates, len(req.input_ids or ()), hits)
        self._note(req, index, blocks)
        sock_send(self.workers[index], req)

    def _note(self, req: Any, index: int, blocks: list[int]) -> None:
        if isinstance(req, TokenizedGenerateReqInput):  # Instances count those alone.
            self.monitor.sent(index, len(req.input_ids or ()))
        self.prefixes.sent(index, blocks)
        if not (isinstance(req, TokenizedGenerateReqInput) and is_internal(req)):
            self.placed[str(index)] += 1
        self.residents.lives(req.rid, index)

    def _fail(self, rid: str) -> None:
        reason = {
            "type": "abort",
            "message": MESSAGE,
            "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        }
        sock_send(self.to_tokenizer, AbortReq(rid=rid, finished_reason=reason))

    def bury(self, instance: int) -> None:
        """An instance has died: nothing goes there any more, and its requests end."""
        if instance in self.undertaker.dead:
            return
        self.status[instance] = False
        self._refresh_active_workers()
        self._active_at = -math.inf
        self.prefixes.forget(instance)
        self.hear_all()
        self.undertaker.died(instance, time.monotonic())
        for index in self._active_workers:
            self.pen.write(index, Died(instance))

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
            self.mover.boundary(message, self.active(), now)
        elif isinstance(message, Over):
            going = self.mover.over(message)
            if going is not None and self.residents.home(going.rid) is not None:
                self.residents.lives(going.rid, going.target if message.done else going.source)
                self.undertaker.settled(going.rid)
        elif isinstance(message, Gone):
            self.residents.gone(message.rid)
            self.prefixes.ended(message.dp_rank, message.blocks)
        elif isinstance(message, LocationReply):
            self.locations.hear(message)
        else:
            self.box.rejected["not for the controller"] += 1

    def _tick(self, now: float) -> None:
        self.mover.forget_old(now)
        self.undertaker.tick(now)
        self.locations.tick(now, {i: self.monitor.dispatched(i) for i in self._active_workers})
        self.processes.tick(now)
        self.board.show(now, self.describe)
        if self.metrics is not None:
            self.metrics.follow("placed_requests", self.placed)
            self.metrics.follow("boundary_decisions", self.mover.decisions)
            self.metrics.follow("controller_rejected", self.box.rejected)

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`: what the controller decided, and whom it hears from."""
        now = time.monotonic()
        heard = self.monitor.heard
        return {
            "placed": dict(self.placed),
            "decisions": dict(self.mover.decisions),
            "moves": dict(self.mover.ended),
            "moves_under_way": len(self.mover.under_way),
            "rejected": dict(self.box.rejected),
            "unsent": self.pen.dropped,
            "residents": len(self.residents),
            "forgotten": self.locations.forgotten,
            "silent_s": [None if at is None else round(now - at, 3) for at in heard],
            "silent": [i for i in range(len(heard)) if self.monitor.is_silent(i, now)],
            "dead": sorted(self.undertaker.dead),
        }

    def event_loop(self) -> None:
        """Wait for requests, messages and the end of schedulers; wake once a second."""
        poller = zmq.Poller()
        poller.register(self.recv_from_tokenizer, zmq.POLLIN)
        poller.register(self.box.socket, zmq.POLLIN)
        for sentinel in self.processes.sentinels:
            poller.register(sentinel, zmq.POLLIN)
        while True:
            self.soft_watchdog.feed()
            ready: dict[Any, int] = dict(poller.poll(WAKE_MS))
            self._tick(time.monotonic())
            if self.box.socket in ready:
                self.hear_all()
            for sentinel in self.processes.sentinels:
                if sentinel in ready:
                    poller.unregister(sentinel)
                    self.bury(self.processes.ended(sentinel))
            if self.recv_from_tokenizer not in ready:
                continue
            while True:
                try:
                    received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._request_dispatcher(received)
