"""Our scheduler: SGLang's, with every request's phase tracked."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq
from sglang.srt.managers.io_struct import AbortReq, GetInternalStateReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.invariant_checker import (
    SchedulerInvariantChecker,
)
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.pool_stats_observer import (
    kv_private_swa_tokens,
    kv_private_tokens,
)
from sglang.utils import TypeBasedDispatcher

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import CONTROL_ENV, ControlReceiver
from pascal_sglang.cluster.internal_requests import is_health_probe
from pascal_sglang.cluster.metric_files import survive_a_full_disk
from pascal_sglang.config import ConfigError, PascalConfig
from pascal_sglang.engine.build import build_executor
from pascal_sglang.engine.kv.paused import PausedRequests, PauseStatus
from pascal_sglang.engine.kv.tool_kv import OUTCOMES
from pascal_sglang.engine.load_reporter import build_load_reporter, load_figures
from pascal_sglang.engine.migration.build import build_migrations, control_place
from pascal_sglang.engine.migration.control_receiver import ControlBatch, PascalRequestReceiver
from pascal_sglang.engine.migration.location_replies import LocationReplies
from pascal_sglang.engine.migration.manager import Migrations
from pascal_sglang.engine.migration.revoked import Revoked
from pascal_sglang.engine.observability.metrics import (
    DecisionMetrics,
    ForecastMetrics,
    PhaseMetrics,
    SupportMetrics,
    ToolMetrics,
)
from pascal_sglang.engine.observability.migration_metrics import MigrationMetrics
from pascal_sglang.engine.observability.phases import (
    PhaseTracker,
    by_class,
    count_phases,
    describe_live,
)
from pascal_sglang.engine.operations import OperationsScheduler
from pascal_sglang.engine.penalties import count_inputs, count_prefilled, counting_inputs
from pascal_sglang.engine.pipeline import StageTurn
from pascal_sglang.engine.rendezvous import meet_on_loopback
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.termination import Termination
from pascal_sglang.engine.thinking_budget import with_default_budget
from pascal_sglang.handshake import INIT_INFO_KEY, change_in, introduced
from pascal_sglang.instances import instance_count, own_instance, speaks, step_together
from pascal_sglang.support import Support

logger = logging.getLogger(__name__)


class PascalOutputStreamer(SchedulerOutputStreamer):
    """Sees every request that produced tokens in a pass, streamed or not, before they leave."""

    tracker: PhaseTracker
    revoked: Revoked | None = None

    def stream_output(
        self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        if self.revoked:
            reqs = self.revoked.without(reqs)
        seen = reqs if skip_req is None else [r for r in reqs if r is not skip_req]
        self.tracker.observe(seen, clock.now())
        SchedulerOutputStreamer.stream_output(self, reqs, return_logprob, skip_req)


class PascalInvariantChecker(SchedulerInvariantChecker):
    """SGLang's leak checks, aware of requests that left the batch but still hold their KV, with or
    without a row."""

    paused_requests: PausedRequests
    migrations: Migrations | None = None

    def _requests_owning_rows(self) -> list[Req]:
        owners: list[Req] = SchedulerInvariantChecker._requests_owning_rows(self)
        known = set(owners)
        between = self.paused_requests.in_status(PauseStatus.LEAVING, PauseStatus.ARRIVING)
        return owners + [r for r in between if r not in known and r.kv.holds_kv]

    def _get_total_uncached_sizes(self) -> tuple[int, int]:
        full, swa = SchedulerInvariantChecker._get_total_uncached_sizes(self)
        rowless = [r.kv for r in self.paused_requests.in_status(PauseStatus.RESIDENT)]
        full += sum(kv_private_tokens(kv, self.page_size) for kv in rowless)
        if self.is_hybrid_swa:
            swa += sum(kv_private_swa_tokens(kv, self.page_size) for kv in rowless)
        if self.migrations is not None:
            full += self.migrations.reserved_tokens
            swa += self.migrations.reserved_windows
        return full, swa


class PascalScheduler(OperationsScheduler):
    """SGLang's scheduler under the policy of `PascalConfig`; `fcfs` only observes."""

    invariant_checker: Any
    request_receiver: Any
    # The level that this instance runs at.
    support: Support
    location_replies: LocationReplies | None = None

    def __init__(self, server_args: Any, port_args: Any) -> None:
        config = PascalConfig.from_env()
        if config is None:
            raise RuntimeError("PascalScheduler started without PASCAL_SGLANG_CONFIG")
        self.support = config.support(server_args)
        # Our launcher has said this in one line; SGLang's own entry points come here.
        config.require_level(self.support)
        # As it was asked for; `pascal_config` is what of it this server can do.
        self._asked_config = config
        self.pascal_config = config.effective(server_args)
        self._meeting = meet_on_loopback(port_args.nccl_port)
        super().__init__(server_args, port_args)

    def init_output_streamer(self) -> None:
        reports = self.metrics_reporter.enable_metrics and speaks()
        labels = self.metrics_collector.labels if reports else {}
        if self.metrics_reporter.enable_metrics:
            survive_a_full_disk()
        metrics = PhaseMetrics(labels, self.pascal_config.qoe_slo) if reports else None
        if reports:
            SupportMetrics(labels, self.support)
        if reports and self.plan_executor is not None:
            copies = self.plan_executor.paused_requests.copies
            self.plan_executor.decision_log.metrics = DecisionMetrics(
                labels, copies.bytes_per_token, copies.capacity
            )
            if self.plan_executor.forecasts is not None:
                self.plan_executor.forecasts.metrics = ForecastMetrics(labels)
            if (kept := self.plan_executor.tool_kv) is not None:
                capacity = kept.copies.capacity * kept.copies.bytes_per_entry
                self.plan_executor.tool_metrics = ToolMetrics(labels, OUTCOMES, capacity)
        if reports and self.migrations is not None:
            self.migrations.report_to(MigrationMetrics(labels))
        self.phase_tracker = PhaseTracker(
            metrics, None if self.plan_executor is None else self._observe
        )
        if self.plan_executor is not None:
            self.plan_executor.phase_tracker = self.phase_tracker
        super().init_output_streamer()
        self.output_streamer.tracker = self.phase_tracker
        self.output_streamer.revoked = (
            None if self.migrations is None else self.migrations.incoming_migrations.revoked
        )

    def _observe(self, live: Sequence[Req], over: Sequence[Req], now: float) -> None:
        assert self.plan_executor is not None
        self.plan_executor.observe(live, over, now)
        if self.load_reporter is not None:
            for req in over:
                self.load_reporter.gone(req)

    def init_request_receiver(self) -> None:
        """Control messages come in with the requests."""
        super().init_request_receiver()
        self._request_dispatcher += TypeBasedDispatcher([(StageTurn, self.take_stage_turn)])
        place = control_place(self.pascal_config)
        if place is None:
            return
        self._request_dispatcher += TypeBasedDispatcher([(ControlBatch, self.take_control_batch)])
        if self.recv_from_tokenizer is None:
            return
        control_receiver = ControlReceiver(place, own_instance(), instance_count())
        stock: Any = self.request_receiver
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
        self.request_receiver = PascalRequestReceiver(**fields, control_receiver=control_receiver)
        if self.idle_sleeper is not None:
            self.idle_sleeper.poller.register(control_receiver.socket, zmq.POLLIN)

    def take_stage_turn(self, turn: StageTurn) -> None:
        if self.plan_executor is not None:
            self.plan_executor.pipeline.hear(turn)

    def ingest_requests(self, *args: Any, **kwargs: Any) -> Any:
        """What is taken in goes on to the next pipeline stage. A paused engine makes no pass, and
        reports here that it lives."""
        requests = super().ingest_requests(*args, **kwargs)
        if self.load_reporter is not None and self._engine_paused:
            self.load_reporter.tell(None, clock.now())
        if self.plan_executor is None:
            return requests
        return self.plan_executor.pipeline.begin(requests)

    def take_control_batch(self, control_batch: ControlBatch) -> None:
        if self.migrations is not None:
            self.migrations.hear(control_batch)
        elif self.location_replies is not None:
            self.location_replies.hear(control_batch)

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return PascalOutputStreamer

    def run_event_loop(self) -> None:
        try:
            super().run_event_loop()
        except Exception:
            others_go_on = self.pascal_config.places and not step_together()
            if not (others_go_on and os.environ.get(CONTROL_ENV)):
                raise
            # SGLang's way out takes the controller along, and with it every instance. Ours sees
            # that this process has ended, whatever would keep it from ending in order.
            logger.exception("pascal_sglang: instance %s failed", own_instance())
            os._exit(1)

    def get_init_info(self) -> dict[str, Any]:
        """Tell the launcher which configuration really runs here (`frontend.require_handshake`)."""
        info = super().get_init_info()
        return introduced(info, own_instance(), self.support)

    def _create_generation_req(
        self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any
    ) -> Req:
        kwargs = with_default_budget(recv_req, kwargs, self.pascal_config.default_thinking_budget)
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.phase_tracker.arrived(req, getattr(recv_req.time_stats, "created_time", 0.0))
        if self.plan_executor is not None:
            self.plan_executor.request_states.arrived(req, recv_req)
        return req

    def send_control_output(self, output: Any, recv_req: Any) -> None:
        """The controller answers for an instance that dies before it has."""
        super().send_control_output(output, recv_req)
        if self.load_reporter is not None:
            self.load_reporter.answered(recv_req)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self.plan_executor is None:
            super()._add_request_to_queue(req, is_retracted=is_retracted)
            return
        with self.plan_executor.admission.everybody():
            super()._add_request_to_queue(req, is_retracted=is_retracted)
            if self.waiting_queue and self.waiting_queue[-1] is req:
                self.plan_executor.request_states.queued(req)
                if self.plan_executor.tool_kv is not None:
                    self.plan_executor.tool_kv.arrived(req)
                # Not what SGLang refuses, which costs nothing, nor what comes back.
                comes = not (is_retracted or req.output_ids) and req.to_finish is None
                if comes and self.plan_executor.forecasts is not None:
                    self.plan_executor.forecasts.arrived(req)

    def init_invariant_checker(self) -> None:
        """The pools exist by now: build the executor, and let SGLang's leak checks count the KV of
        requests on their way out."""
        super().init_invariant_checker()
        self.plan_executor, self.support = build_executor(self, self.pascal_config, self.support)
        self.load_reporter = build_load_reporter(self, self.plan_executor)
        if self.external_corpus_manager is not None:
            # Its answer to a corpus that has been loaded would pass by `send_control_output`.
            self.external_corpus_manager._send_response = self.send_control_output
        if self.plan_executor is not None:
            stock: Any = self.invariant_checker
            fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
            self.invariant_checker = PascalInvariantChecker(**fields)
            self.invariant_checker.paused_requests = self.plan_executor.paused_requests
            self.migrations, self.support = build_migrations(
                self, self.plan_executor, self.pascal_config, self.support
            )
            self.plan_executor.migrations = self.invariant_checker.migrations = self.migrations
            # Every rank listens: all of them end in the same pass.
            self.location_replies = LocationReplies(
                scheduler=self,
                paused_requests=self.plan_executor.paused_requests,
                load_reporter=self.load_reporter,
            )
            if self.migrations is not None:
                self.migrations.locate = self.location_replies.reply
            if (kept := self.plan_executor.tool_kv) is not None:
                self.location_replies.elsewhere = kept.elsewhere
                if self.migrations is not None:
                    self.migrations.elsewhere, self.migrations.left = kept.elsewhere, kept.left
            self._listen_for_the_end()

    def _listen_for_the_end(self) -> None:
        place = control_place(self.pascal_config)
        if not self.pascal_config.drain_on_term or place is None or step_together():
            return
        self.termination = Termination(self, place)
        for listener in (self.migrations, self.location_replies):
            if listener is not None:
                listener.end = self.termination.may_end

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> Any:
        if self.plan_executor is not None:
            running_batch = self.plan_executor.govern(running_batch, last_batch)
        if self.termination is not None:
            self.termination.step()
        plan = super().get_next_batch_to_run(running_batch=running_batch, last_batch=last_batch)
        if self.plan_executor is not None and self.plan_executor.tool_kv is not None:
            self.plan_executor.tool_kv.hold_steps()
        if self.load_reporter is not None and self.plan_executor is not None:
            now = self.plan_executor.request_states.pass_info.now
            self.load_reporter.tell(plan.batch_to_run, now)
        return plan

    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput, **kwargs: Any) -> Any:
        if self.load_reporter is not None and not is_health_probe(recv_req):
            self.load_reporter.received += 1
        return super().handle_generate_request(recv_req, **kwargs)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        updated: ScheduleBatch | None
        if self.plan_executor is None:
            updated = super().update_running_batch(batch)
            return updated
        if self.plan_executor.relieve(batch):
            batch.batch_is_full = False
            return None  # As SGLang does where finishing requests are about to give memory back.
        # Read by `retract_decode`, which now strikes only what cannot be paused.
        batch._get_decode_retraction_order = self.plan_executor.retraction_order
        try:
            with counting_inputs(batch, self):
                updated = super().update_running_batch(batch)
        finally:
            batch.__dict__.pop("_get_decode_retraction_order", None)
        return updated

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> Any:
        if self.plan_executor is None:
            return super().get_new_batch_prefill(running_batch)
        # The plan says in every pass what fits. SGLang would remember that something did not until
        # a request ends, also where memory is about to come back from a pause.
        running_batch.batch_is_full = False
        started = self.plan_executor.request_states.started
        only_planned = self.plan_executor.admission.only_planned(started)
        with only_planned, counting_inputs(running_batch, self):
            plan = super().get_new_batch_prefill(running_batch)
        if plan.batch_to_run is not None:
            count_prefilled(plan.batch_to_run)
        return plan

    def can_schedule_lora_req(self, req: Req, running_loras: set[str | None]) -> bool:
        if self.plan_executor is not None:
            running_loras = running_loras | self.plan_executor.lora_slots.arriving()
        fits: bool = super().can_schedule_lora_req(req, running_loras)
        return fits

    @contextmanager
    def _forward_isolation(self, batch: ScheduleBatch, *, overlap: bool) -> Iterator[None]:
        if overlap and self.plan_executor is not None:
            count_inputs(batch)
        with super()._forward_isolation(batch, overlap=overlap):
            yield

    def _should_defer_prefill(self, running_batch: ScheduleBatch) -> bool:
        deferred: bool = super()._should_defer_prefill(running_batch)
        waits = bool(self.waiting_queue) or self.chunked_req is not None
        return deferred or (self.migrations is not None and self.migrations.defers_prefill(waits))

    def is_disable_overlap_for_batch(
        self, batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> bool:
        """Whoever has just arrived gets its first token before the next step, not after it."""
        disabled: bool = super().is_disable_overlap_for_batch(batch, last_batch=last_batch)
        if disabled or self.migrations is None or not last_batch:
            return disabled
        return self.migrations.incoming_migrations.came_with(self.result_queue[0][0])

    def abort_request(self, recv_req: AbortReq) -> None:
        def matches(rid: str) -> bool:
            return recv_req.abort_all or rid.startswith(recv_req.rid)

        if self.migrations is not None:
            self.migrations.aborted("" if recv_req.abort_all else recv_req.rid, matches)
        # Marks those that run, and those that we hold, with the reason.
        super().abort_request(recv_req)
        if self.plan_executor is None:
            return
        for req in self.plan_executor.paused_requests.forget(lambda r: matches(r.rid)):
            self.end_early(req, None)
        if (kept := self.plan_executor.tool_kv) is not None:
            if recv_req.abort_all:
                kept.drop()
            else:
                kept.forget(matches)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        """With a change of the configuration in it, that is made first: in the same pass on all TP
        ranks, which get the message with the same requests."""
        if recv_req.rid is not None:
            self.reconfigure(change_in(recv_req.rid))
        output = super().get_internal_state(recv_req)
        output.internal_state[INIT_INFO_KEY] = self.pascal_status()
        return output

    def reconfigure(self, values: dict[str, Any]) -> None:
        """Go by other values from this pass on: all of them, or none where one is refused."""
        try:
            self._asked_config = self._asked_config.changed(values)
        except ConfigError as error:
            logger.error("pascal_sglang: the configuration stays: %s", error)
            return
        config = self.pascal_config = self._asked_config.effective(self.server_args)
        if self.plan_executor is not None:
            self.plan_executor.reconfigure(config)
        if self.phase_tracker.metrics is not None:
            self.phase_tracker.metrics.qoe_slo = config.qoe_slo
        if speaks():
            shown = " ".join(f"{name}={getattr(config, name)}" for name in values)
            logger.warning("pascal_sglang: the configuration changes: %s", shown)

    def pascal_status(self) -> dict[str, Any]:
        """This instance for `GET /pascal/status`: counts by phase, KV tokens, requests."""
        live = [req for req in Scheduler.collect_inflight_reqs(self) if not req.finished()]
        executor = self.plan_executor
        paused_requests = None if executor is None else executor.paused_requests
        paused, arriving = [], []
        if paused_requests is not None:
            leaving = paused_requests.in_status(PauseStatus.LEAVING)
            paused = [*leaving, *paused_requests.paused()]
            arriving = paused_requests.in_status(PauseStatus.ARRIVING)
        live = list(dict.fromkeys([*live, *paused, *arriving]))
        pools = self.pool_stats_observer.get_pool_stats()
        forecasts = None if executor is None else executor.forecasts
        return {
            "dp_rank": own_instance(),
            "pid": os.getpid(),
            "policy": self.pascal_config.policy,
            "config": self.pascal_config.changeable(),
            "support": self.support.describe(),
            "waiting": len(self.waiting_queue),
            "running": count_phases(live),
            "ended": dict(self.phase_tracker.outcomes),
            "kv_tokens": {
                "capacity": pools.full_capacity,
                "free": pools.full_available_size,
                "evictable": pools.full_evictable_size,
                "host": 0 if paused_requests is None else paused_requests.host_tokens,
                "host_capacity": 0 if paused_requests is None else paused_requests.copies.capacity,
            },
            "recurrent_states": None if executor is None else executor.capacity.describe_states(),
            "windows": None if executor is None else executor.capacity.describe_windows(),
            "load": {} if executor is None else load_figures(self, executor, self.last_batch),
            "paused": len(paused),
            "pauses": {} if paused_requests is None else dict(paused_requests.counts),
            "costs": {} if paused_requests is None else paused_requests.costs.describe(),
            "decisions": {} if executor is None else dict(executor.decision_log.counts),
            "queued": {} if executor is None else by_class(executor.planner.queue.lengths()),
            "tenants": None
            if executor is None or executor.tenants is None
            else executor.tenants.describe(),
            "tool_calls": None
            if executor is None or executor.tool_kv is None
            else executor.tool_kv.describe(),
            "migrations": None if self.migrations is None else self.migrations.describe(),
            "unpausable": {} if executor is None else dict(executor.request_states.unpausable),
            "policy_errors": 0 if executor is None else executor.errors,
            "queue_errors": 0 if executor is None else executor.admission.errors,
            "forecast": None if forecasts is None else forecasts.describe(),
            "requests": self._describe(live, "running")
            + self._describe(self.waiting_queue, "waiting"),
            "recent": list(self.phase_tracker.recent),
        }

    def _describe(self, reqs: Sequence[Req], status: str) -> list[dict[str, Any]]:
        """Live requests for `GET /pascal/status`. status: theirs where no policy schedules them."""
        now, executor = clock.now(), self.plan_executor
        if executor is None:
            return [describe_live(req, now, status, None) for req in reqs]
        moving = set() if self.migrations is None else self.migrations.moving()
        pass_info, class_of = executor.request_states.pass_info, executor.decision_log.class_of
        forecasts = executor.forecasts
        shown = []
        for req in reqs:
            state = state_of(req)
            at = "moving" if req.rid in moving else state.status.value
            about = describe_live(req, now, at, class_of(state, pass_info))
            about["answer_in_s"] = None if forecasts is None else forecasts.of(req)
            shown.append(about)
        return shown
