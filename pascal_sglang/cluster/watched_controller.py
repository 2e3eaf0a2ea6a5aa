"""The controller's loop, which no message, no full disk and no dead instance ends or holds up.

SGLang's controller waits without a bound for whoever does not take what it sends, notices no
scheduler that ends, and itself ends with the first exception, whatever the message was.
"""

from __future__ import annotations

import math
import multiprocessing.connection
from collections import Counter
from http import HTTPStatus
from typing import Any

import zmq
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReq,
    ProfileReq,
    ShutdownReq,
    sock_recv,
    sock_send,
)
from sglang.srt.utils.network import get_zmq_socket

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import ControlReceiver
from pascal_sglang.cluster.control_replies import ControlReplies
from pascal_sglang.cluster.instance_failures import MESSAGE, InstanceFailures
from pascal_sglang.cluster.loop_errors import LoopErrors
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.cluster.scheduler_processes import SchedulerProcesses
from pascal_sglang.cluster.worker_sender import WorkerSender
from pascal_sglang.config import PascalConfig
from pascal_sglang.instances import step_together

# The watchdog wants to be fed now and then.
WAKE_MS = 1000
# The same while messages wait for an instance that is not connected.
RETRY_MS = 20
# How often to look for ended schedulers while requests are being placed, in seconds.
LOOK_FOR_ENDED_S = 0.1
# Messages taken in before the loop looks at everything else again.
TAKE_IN = 64


class InstanceUnavailable(RuntimeError):
    """A request asks for an instance that takes none; the text says why."""


class WatchedController(DataParallelController):
    """SGLang's controller with bounded sends, its schedulers watched, errors kept to their message.

    `others_go_on` says what a death means. Where requests are placed by phase, the others go on.
    Under SGLang's own balancing, which cannot leave an instance out, the server ends, and so it
    does where instances take their steps together.
    """

    pascal_config: PascalConfig
    processes: SchedulerProcesses
    request_locations: RequestLocations
    instance_failures: InstanceFailures
    control_receiver: ControlReceiver
    workers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.errors = LoopErrors()
        self.replies = ControlReplies(self._to_tokenizer)
        # Why the loop ends; empty while it goes on.
        self._over = ""
        # SGLang has asked the schedulers to end.
        self._stopping = False
        self._looked_at = -math.inf
        self._poller = zmq.Poller()
        super().__init__(*args, **kwargs)
        # Every send of SGLang's to an instance goes through these.
        sockets: list[Any] = self.workers
        self.workers = [None if s is None else WorkerSender(s) for s in sockets]
        self.to_tokenizer = get_zmq_socket(
            self.context, zmq.PUSH, self.port_args.tokenizer_ipc_name, False
        )

    @property
    def others_go_on(self) -> bool:
        """Whether instances serve on when one of them has died."""
        return self.pascal_config.places and not step_together()

    def silent(self) -> list[int]:
        """Live instances that have stopped to say how they are."""
        return []

    def wake_ms(self) -> int:
        """How long to wait for a message, at most."""
        return RETRY_MS if any(self.workers) else WAKE_MS

    def error_counts(self) -> Counter[str]:
        """Errors that were survived, by what was going on."""
        return Counter(dict(self.errors.counts))

    def hear_all(self) -> None:
        """Take in everything that the instances have said."""

    def states(self) -> dict[int, str]:
        """Each instance: one of `metrics.STATES`."""
        silent = self.silent()
        return {
            i: "dead" if i in self.instance_failures.dead else "silent" if i in silent else "live"
            for i, worker in enumerate(self.workers)
            if worker is not None
        }

    def init_dispatcher(self) -> None:
        super().init_dispatcher()
        # SGLang chooses by `status`, which is `_active_workers` here: one way for all of them.
        self._request_dispatcher._mapping[ProfileReq] = self.send_control_message

    def send_control_message(self, obj: Any) -> None:
        """Every live instance answers, and for the others this controller does."""
        self._stopping |= isinstance(obj, ShutdownReq)
        super().send_control_message(obj)
        absent = dict.fromkeys(self.instance_failures.dead, "dead")
        if isinstance(obj, GetInternalStateReq):
            absent |= dict.fromkeys(self.silent(), "silent")
        self.replies.sent(obj, set(self._active_workers) - absent.keys(), absent)

    def maybe_external_dp_rank_routing(self, req: Any) -> bool:
        """Raises: InstanceUnavailable for an instance that has died."""
        if req.routed_dp_rank in self.instance_failures.dead:
            raise InstanceUnavailable(f"Instance {req.routed_dp_rank} has died.")
        routed: bool = super().maybe_external_dp_rank_routing(req)
        return routed

    def dispatching_with_trace(self, req: Any, refresh_load_budget: bool = True) -> None:
        """Send one request, alone or of a batch, on its way; one that can go nowhere ends."""
        self.look_for_ended()
        try:
            super().dispatching_with_trace(req, refresh_load_budget)
        except Exception as error:
            if not isinstance(error, InstanceUnavailable):
                self.errors.note("dispatch", error)
            self.request_locations.gone(req.rid)
            self._end(req.rid, req.http_worker_ipc, str(error) or repr(error))

    def _fail(self, rid: str) -> None:
        self._end(rid, self.request_locations.worker_ipc(rid), MESSAGE)

    def _end(self, rid: str, worker_ipc: str | None, message: str) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        reason = {"type": "abort", "message": message, "status_code": status}
        self._to_tokenizer(AbortReq(rid=rid, http_worker_ipc=worker_ipc, finished_reason=reason))

    def _to_tokenizer(self, message: Any) -> None:
        """Never waits: a PUSH socket that connects, and has no high-water mark, takes it all."""
        sock_send(self.to_tokenizer, message, flags=zmq.NOBLOCK)

    def look_for_ended(self, *, at_once: bool = False) -> None:
        """See which schedulers have ended; among many requests only now and then."""
        now = clock.now()
        if now - self._looked_at < LOOK_FOR_ENDED_S and not at_once:
            return
        self._looked_at = now
        for sentinel in multiprocessing.connection.wait(self.processes.sentinels, timeout=0):
            assert isinstance(sentinel, int)
            self._poller.unregister(sentinel)
            instance, in_order = self.processes.ended(sentinel)
            if self.others_go_on:
                with self.errors.kept("the end of an instance"):
                    self.on_instance_down(instance)
            if in_order or self._stopping:
                continue
            if not self.others_go_on:
                self._over = f"a scheduler of instance {instance} has ended"
            elif not self._active_workers:
                self._over = "every instance has died"

    def on_instance_down(self, instance: int) -> None:
        """An instance has died: nothing goes there any more."""
        self.status[instance] = False
        self._refresh_active_workers()
        self.workers[instance].close()
        self.replies.died(instance)

    def _tick(self, now: float) -> None:
        """At every turn of the loop."""
        self.processes.tick(now)

    def event_loop(self) -> None:
        """Wait for requests, messages and the end of schedulers; wake once a second.

        Raises: RuntimeError when there is nobody left to serve.
        """
        for waited_for in (
            self.recv_from_tokenizer,
            self.control_receiver.socket,
            *self.processes.sentinels,
        ):
            self._poller.register(waited_for, zmq.POLLIN)
        while not self._over:
            self.soft_watchdog.feed()
            unsent = [worker for worker in self.workers if worker]
            ready: dict[Any, int] = dict(self._poller.poll(self.wake_ms()))
            for worker in unsent:
                worker.flush()
            # As of a moment before it has heard all: where this process stood still, what instances
            # said meanwhile lies unread, and they are not silent.
            now = clock.now()
            self.hear_all()
            with self.errors.kept("housekeeping"):
                self._tick(now)
            self.look_for_ended(at_once=not ready.keys().isdisjoint(self.processes.sentinels))
            if self.recv_from_tokenizer in ready:
                self._take_in()
        raise RuntimeError(self._over)

    def _take_in(self) -> None:
        """Requests and control messages that have come, but not without end."""
        for _ in range(TAKE_IN):
            try:
                received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                raise
            except Exception as error:
                self.errors.note("unreadable request", error)
                continue
            with self.errors.kept(type(received).__name__):
                self._request_dispatcher(received)
