"""Our data-parallel controller: SGLang's, event-driven, placing and moving requests by phase.

SGLang's polls its socket without ever waiting and keeps a core busy; this one sleeps until there is
something to do. It hears how the instances are, sends a new request where Algorithm 1 says and
orders moves by Algorithm 2 (`policy.placement`), unless SGLang's own balancing was asked for.
"""

from __future__ import annotations

import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sglang.srt.managers.io_struct import (
    GetInternalStateReq,
    TokenizedGenerateReqInput,
    sock_send,
)
from sglang.srt.runtime_context import get_observability

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import (
    CONTROL_ENV,
    CONTROLLER,
    FRONT_END,
    ControlReceiver,
    ControlSender,
    tcp_place,
)
from pascal_sglang.cluster.drains import Drains
from pascal_sglang.cluster.instance_failures import InstanceFailures
from pascal_sglang.cluster.internal_requests import is_health_probe, is_internal
from pascal_sglang.cluster.load_tracker import LoadTracker
from pascal_sglang.cluster.location_check import LocationCheck
from pascal_sglang.cluster.messages import (
    MAX_STATE_BYTES,
    MAX_TEXT,
    ControlAnswered,
    DrainReply,
    DrainRequest,
    InstanceDown,
    LoadReport,
    LocationReply,
    MayEnd,
    MigrationEnded,
    ReasoningEnded,
    RequestFinished,
    Terminating,
    TurnElsewhere,
)
from pascal_sglang.cluster.metrics import ControllerMetrics
from pascal_sglang.cluster.migration_coordinator import MigrationCoordinator
from pascal_sglang.cluster.prefix_index import PrefixIndex, block_names
from pascal_sglang.cluster.private_folder import PrivateFolder, remove_ownerless
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.cluster.scheduler_processes import SchedulerProcesses
from pascal_sglang.cluster.status_file import StatusFile
from pascal_sglang.cluster.watched_controller import (
    RETRY_MS,
    InstanceUnavailable,
    WatchedController,
)
from pascal_sglang.config import ConfigError, PascalConfig
from pascal_sglang.handshake import (
    change_in,
    handed_on,
    hosts_by_instance,
    instances_by_pid,
    require_same_config,
    support_of,
)
from pascal_sglang.instances import hosts
from pascal_sglang.policy.placement import Instance, Placement, PlacementRule
from pascal_sglang.policy.prefix_namespace import namespace_sent
from pascal_sglang.policy.site import FAR, SAME_HOST, Site
from pascal_sglang.support import EVERYTHING, Level, Support

logger = logging.getLogger(__name__)

# How often to look which instances have fallen silent, in seconds.
LOOK_S = 0.2


class PascalController(WatchedController):
    """`DataParallelController` under the configuration in `PASCAL_SGLANG_CONFIG`."""

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        asked = PascalConfig.from_env()
        assert asked is not None
        # As it was asked for; `pascal_config` is what of it this server can do.
        self._asked_config = asked
        config = self.pascal_config = asked.effective(server_args)
        self._support = EVERYTHING
        remove_ownerless()
        self._folder = PrivateFolder(os.environ.get(CONTROL_ENV))
        listen = config.control_listen
        # Before the instances start, whose number is known after that: they are told its place.
        self.control_receiver = ControlReceiver(
            self._folder.path if listen is None else tcp_place(listen), CONTROLLER, 0
        )
        os.environ[CONTROL_ENV] = self.control_receiver.place
        self._instance_of_pid: dict[int, int] = {}
        # Of the first process of each instance.
        self._hosts: dict[int, str] = {}
        super().__init__(server_args, *args, **kwargs)
        instances = self.control_receiver.instances = len(self.workers)
        self.control_sender = ControlSender(self.control_receiver.place, CONTROLLER)
        self.load_tracker = LoadTracker(instances)
        racks = [config.rack_of(address) for address in hosts()] or [""] * instances
        for index, host in self._hosts.items():
            self.load_tracker.instances[index].site = Site(host, racks[index])
        self.prefixes = PrefixIndex()
        rule = config.record.placement or PlacementRule()
        self.placement = Placement(
            quantum=config.quantum_tokens,
            lazy=rule.lazy and config.migration != "always",
            adaptive=config.migration != "always",
            predict=rule.predict,
            # Shared memory is one host's.
            reach=FAR if config.kv_transport == "mooncake" else SAME_HOST,
        )
        self.request_locations = RequestLocations()
        self.coordinator = MigrationCoordinator(
            self.load_tracker,
            self.placement,
            self.control_sender.send,
            force_migration=config.force_migration > 0,
        )
        self.drains = Drains(
            self.request_locations,
            self.coordinator,
            self._choose_target,
            "" if self._support.level >= Level.MOVE else self._support.reason,
        )
        self._active: list[Instance] = []
        self._active_at = -math.inf
        self.placed: Counter[str] = Counter()
        self._probes = 0
        self.instance_failures = InstanceFailures(
            self.request_locations, self.coordinator, self._fail
        )
        self.locations = LocationCheck(
            self.request_locations, self.control_sender.send, self.coordinator.migrating
        )
        self.processes = SchedulerProcesses(
            self.schedulers(list(self._instance_of_pid)), self._instance_of_pid
        )
        self.status_file = StatusFile(self._folder.path)
        reports = get_observability().enable_metrics
        model = str(self.server_args.served_model_name)
        self.metrics = ControllerMetrics(model) if reports else None
        if self.others_go_on:
            self.processes.outlive_schedulers()
        if config.places:
            self.dispatching: Callable[[Any], None] = self.place

    def send_control_message(self, obj: Any) -> None:
        if isinstance(obj, GetInternalStateReq) and obj.rid is not None:
            with suppress(ConfigError):  # The instances, which have the same, say so.
                self._asked_config = self._asked_config.changed(change_in(obj.rid))
                self.pascal_config = self._asked_config.effective(self.server_args)
                self.placement.quantum = self.pascal_config.quantum_tokens
        super().send_control_message(obj)

    def schedulers(self, pids: list[int]) -> list[Any]:
        """The processes that were started, with `pid`, `sentinel` and `exitcode`.

        pids: what they said of themselves, in the order in which they said it.
        """
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
        self._instance_of_pid.update(instances_by_pid(infos))
        self._hosts = hosts_by_instance(infos) | self._hosts
        self._support = Support.least([self._support, support_of(infos)])
        super()._record_scheduler_init_infos(infos)

    def get_init_info(self) -> dict[str, Any]:
        """The controller vouches for its instances towards the launcher."""
        self.status_file.show(clock.now(), self.describe)
        return handed_on(
            super().get_init_info(),
            self.status_file.path,
            self.control_receiver.place,
            self._support,
        )

    def silent(self) -> list[int]:
        now = clock.now()
        return [i for i in self._active_workers if self.load_tracker.is_silent(i, now)]

    def active(self) -> list[Instance]:
        """Instances that take requests, and are not drained; those that have fallen silent only if
        there are no others. Raises: RuntimeError if there are none."""
        now = clock.now()
        if now - self._active_at < LOOK_S:
            return self._active
        found = [
            self.load_tracker.instances[i]
            for i in self._active_workers
            if self.status[i] and not self.drains.holds(i)
        ]
        if not found:
            raise RuntimeError("no active instance to send a request to")
        self._active = [i for i in found if not self.load_tracker.is_silent(i.index, now)] or found
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
        blocks = list(block_names(req.input_ids or (), namespace_sent(req)))
        if self.maybe_external_dp_rank_routing(req):
            if self.pascal_config.tool_kv:
                self._tell_holder(req, req.routed_dp_rank, self.prefixes.hits(blocks))
            self._note(req, req.routed_dp_rank, blocks)
            return
        hits = self.prefixes.hits(blocks)
        candidates = self.placement.in_sight(self.active(), hits)
        index = self.placement.place(candidates, len(req.input_ids or ()), hits)
        # A request that its instance would not take is refused here, and counts nowhere.
        sock_send(self.workers[index], req)
        if self.pascal_config.tool_kv:
            self._tell_holder(req, index, hits)
        self._note(req, index, blocks)

    def _tell_holder(self, req: Any, index: int, hits: Mapping[int, int]) -> None:
        """A request goes to an instance. Tell the one that has more of its prompt than that one
        has, which may keep it for just this request (`engine.kv.tool_kv`). hits: what each has."""
        holder = max(hits, key=lambda i: hits[i], default=index)
        if hits.get(holder, 0) <= hits.get(index, 0):
            return
        ids = array("q", req.input_ids).tobytes()
        namespace = namespace_sent(req)
        if len(ids) <= MAX_STATE_BYTES and all(len(part or "") <= MAX_TEXT for part in namespace):
            self.control_sender.send(holder, TurnElsewhere(ids, *namespace))

    def maybe_external_dp_rank_routing(self, req: Any) -> bool:
        """Raises: InstanceUnavailable for an instance that is drained, too."""
        if req.routed_dp_rank is not None and self.drains.holds(req.routed_dp_rank):
            raise InstanceUnavailable(f"Instance {req.routed_dp_rank} is drained.")
        return super().maybe_external_dp_rank_routing(req)

    def _note(self, req: Any, index: int, blocks: list[int]) -> None:
        if isinstance(req, TokenizedGenerateReqInput):  # Instances count those alone.
            self.load_tracker.sent(index, len(req.input_ids or ()))
        self.prefixes.sent(index, blocks)
        if not (isinstance(req, TokenizedGenerateReqInput) and is_internal(req)):
            self.placed[str(index)] += 1
        self.request_locations.lives(req.rid, index, req.http_worker_ipc)

    def on_instance_down(self, instance: int) -> None:
        """An instance has died: nothing goes there any more, and its requests end."""
        if instance in self.instance_failures.dead:
            return
        super().on_instance_down(instance)
        self._active_at = -math.inf
        with self.errors.kept("the end of an instance"):
            self.prefixes.forget(instance)
            for lifted in self.drains.died(instance, self._active_workers):
                logger.warning(
                    "pascal_sglang: instance %d takes requests again: no other is left", lifted
                )
        self.hear_all()
        self.instance_failures.died(instance, clock.now())
        for index in self._active_workers:
            self.control_sender.send(index, InstanceDown(instance))

    def hear_all(self) -> None:
        """Take in everything that the instances have said."""
        now = clock.now()
        for data in self.control_receiver.receive():
            with self.errors.kept("control message"):
                read = self.control_receiver.read(data)
                if read is not None:
                    self._hear(read[1], now)

    def _hear(self, message: Any, now: float) -> None:
        if isinstance(message, LoadReport):
            self.load_tracker.hear(message, now)
        elif isinstance(message, ReasoningEnded):
            self.coordinator.boundary(message, self.active(), now)
        elif isinstance(message, MigrationEnded):
            going = self.coordinator.over(message)
            if going is not None and self.request_locations.instance_of(going.rid) is not None:
                self.request_locations.lives(
                    going.rid, going.target if message.done else going.source
                )
                self.instance_failures.settled(going.rid)
            if going is not None:
                self.drains.settled(going, done=message.done, why=message.why, now=now)
        elif isinstance(message, DrainRequest):
            self._drain(message, now)
        elif isinstance(message, Terminating):
            self._terminating(message, now)
        elif isinstance(message, RequestFinished):
            self.request_locations.gone(message.rid)
            self.prefixes.ended(message.dp_rank, message.blocks)
        elif isinstance(message, LocationReply):
            self.locations.hear(message)
        elif isinstance(message, ControlAnswered):
            self.replies.answered(message.dp_rank, message.request)
        else:
            self.control_receiver.rejected["not for the controller"] += 1

    def _drain(self, asked: DrainRequest, now: float) -> None:
        """Drain an instance, or let it take requests again, and say how far it is."""
        problem = ""
        if not self.pascal_config.places:
            problem = "SGLang's own balancing places the requests of this server."
        elif asked.drain:
            problem = self.drains.begin(asked.dp_rank, self._active_workers, now)
        else:
            problem = self.drains.end(asked.dp_rank)
        self._active_at = -math.inf
        self._step_drains(now)
        progress = self.drains.progress(asked.dp_rank, now)
        self.control_sender.send(FRONT_END, DrainReply(asked.number, problem, progress))

    def _choose_target(self, found: Sequence[Instance], source: int) -> int:
        """Where a request of an instance that is drained goes on."""
        leaves = self.load_tracker.instances[source]
        # One that KV does not reach is better than none: the request goes without.
        found = self.placement.reachable(found, leaves) or found
        return self.placement.place(self.placement.in_sight(found, (), leaves), 0, source=leaves)

    def _terminating(self, said: Terminating, now: float) -> None:
        """An instance was told to end: it is drained first, unless it is the last one or was told
        so before."""
        instance = said.dp_rank
        problem = self.drains.begin(instance, self._active_workers, now)
        if not problem and self.drains.told_to_end(instance, said.rank):
            problem = f"Instance {instance} was told to end before."
        if problem:
            self.control_sender.send(instance, MayEnd(problem))
            return
        logger.info("pascal_sglang: instance %d was told to end, and is drained", instance)
        self._active_at = -math.inf

    def _step_drains(self, now: float) -> None:
        """Order what is to move off instances that are drained."""
        if not self.drains:
            return
        silent = self.silent()
        serving = [i for i in self.active() if i.index not in silent]
        for instance in self.drains.step(serving, now):
            if self.control_sender.send(instance, MayEnd("")):
                self.drains.ends(instance)

    def wake_ms(self) -> int:
        return RETRY_MS if self.drains else super().wake_ms()

    def _tick(self, now: float) -> None:
        super()._tick(now)
        with self.errors.kept("drains"):
            self._step_drains(now)
        with self.errors.kept("the end of an instance"):
            self.instance_failures.tick(now)
        with self.errors.kept("lost messages"):
            self.coordinator.forget_old(now)
            sent = {i: self.load_tracker.dispatched(i) for i in self._active_workers}
            self.locations.tick(now, sent)
        with self.errors.kept("status"):
            self.status_file.show(now, self.describe)
        if self.metrics is not None:
            with self.errors.kept("metrics"):
                self._count(self.metrics)

    def _count(self, metrics: ControllerMetrics) -> None:
        metrics.follow("placed_requests", self.placed)
        metrics.follow("boundary_decisions", self.coordinator.decisions)
        metrics.follow("controller_rejected", self.control_receiver.rejected)
        metrics.follow("controller_errors", self.error_counts())
        metrics.follow("drain_moves", self.drains.outcomes)
        metrics.count_undrained(self.drains.left())
        metrics.count_instances(Counter(self.states().values()))

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`: what the controller decided, and whom it hears from."""
        now = clock.now()
        heard = self.load_tracker.heard
        states = self.states()
        return {
            "states": [states[i] for i in sorted(states)],
            "placed": dict(self.placed),
            "decisions": dict(self.coordinator.decisions),
            "migrations": dict(self.coordinator.ended),
            "migrations_under_way": len(self.coordinator.under_way),
            "rejected": dict(self.control_receiver.rejected),
            "errors": dict(self.error_counts()),
            "unsent": self.control_sender.dropped
            + sum(w.dropped for w in self.workers if w is not None),
            "unwritten": self.status_file.failed,
            "control_addresses": self.control_receiver.describe(),
            "sites": [asdict(each.site) for each in self.load_tracker.instances],
            "live_requests": len(self.request_locations),
            "forgotten": self.locations.forgotten,
            "silent_s": [None if at is None else round(now - at, 3) for at in heard],
            "silent": [i for i in states if states[i] == "silent"],
            "dead": sorted(self.instance_failures.dead),
            "drains": self.drains.describe(now),
        }
