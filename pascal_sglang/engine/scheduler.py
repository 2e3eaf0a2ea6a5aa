"""Our scheduler: SGLang's, with every request's phase tracked."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from functools import partial
from typing import Any

import zmq
from sglang.srt.managers.io_struct import AbortReq, GetInternalStateReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.invariant_checker import (
    SchedulerInvariantChecker,
)
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens
from sglang.srt.runtime_context import get_parallel
from sglang.utils import TypeBasedDispatcher

from pascal_sglang.cluster.control_channel import POST_ENV, Box
from pascal_sglang.cluster.internal_requests import is_health_probe
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.build import build_governor
from pascal_sglang.engine.kv.paused import Ladder
from pascal_sglang.engine.load_reporter import build_herald, figures
from pascal_sglang.engine.migration import location_replies
from pascal_sglang.engine.migration.build import build_moves, letters_here
from pascal_sglang.engine.migration.control_receiver import Letters, PascalRequestReceiver
from pascal_sglang.engine.migration.manager import Moves
from pascal_sglang.engine.migration.revoked import Revoked
from pascal_sglang.engine.observability.metrics import DecisionMetrics, PhaseMetrics
from pascal_sglang.engine.observability.migration_metrics import MoveMetrics
from pascal_sglang.engine.observability.phases import PhaseTracker, by_class, count_phases, describe
from pascal_sglang.engine.operations import OperationsScheduler
from pascal_sglang.engine.rendezvous import meet_on_loopback
from pascal_sglang.engine.thinking_budget import with_default_budget
from pascal_sglang.entrypoints.preflight import check_policy
from pascal_sglang.handshake import INIT_INFO_KEY, introduced

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
        self.tracker.observe((r for r in reqs if r is not skip_req), time.perf_counter())
        SchedulerOutputStreamer.stream_output(self, reqs, return_logprob, skip_req)


class PascalInvariantChecker(SchedulerInvariantChecker):
    """SGLang's leak checks, aware of requests that left the batch but still hold their KV, with or
    without a row."""

    ladder: Ladder
    moves: Moves | None = None

    def _requests_owning_rows(self) -> list[Req]:
        owners = SchedulerInvariantChecker._requests_owning_rows(self)
        known = set(owners)
        between = (*self.ladder.leaving, *self.ladder.arriving)
        return owners + [r for r in between if r not in known and r.kv.holds_kv]

    def _get_total_uncached_sizes(self) -> tuple[int, int]:
        full, swa = SchedulerInvariantChecker._get_total_uncached_sizes(self)
        rowless = sum(kv_private_tokens(r.kv, self.page_size) for r in self.ladder.resident)
        reserved = 0 if self.moves is None else self.moves.reserved_tokens
        return full + rowless + reserved, swa


class PascalScheduler(OperationsScheduler):
    """SGLang's scheduler under the policy of `PascalConfig`; `fcfs` only observes."""

    def __init__(self, server_args: Any, port_args: Any) -> None:
        config = PascalConfig.from_env()
        if config is None:
            raise RuntimeError("PascalScheduler started without PASCAL_SGLANG_CONFIG")
        # Our launcher has said this in one line; SGLang's own entry points come here.
        check_policy(config.policy, server_args)
        self.pascal_config = config
        self._meeting = meet_on_loopback(port_args.nccl_port)
        super().__init__(server_args, port_args)

    def init_output_streamer(self) -> None:
        reports = self.metrics_reporter.enable_metrics and get_parallel().attn_tp_rank == 0
        labels = self.metrics_collector.labels if reports else {}
        metrics = PhaseMetrics(labels, self.pascal_config.qoe_slo) if reports else None
        if reports and self.governor is not None:
            per_token = self.governor.ladder.copies.bytes_per_token
            self.governor.journal.metrics = DecisionMetrics(labels, per_token)
        if reports and self.moves is not None:
            self.moves.report_to(MoveMetrics(labels))
        self.phase_tracker = PhaseTracker(metrics, None if self.governor is None else self._observe)
        super().init_output_streamer()
        self.output_streamer.tracker = self.phase_tracker
        self.output_streamer.revoked = None if self.moves is None else self.moves.arrivals.revoked

    def _observe(self, req: Req) -> None:
        assert self.governor is not None
        self.governor.observe(req)
        if self.herald is not None and req.finished():
            self.herald.gone(req)

    def init_request_receiver(self) -> None:
        """Control messages come in with the requests."""
        super().init_request_receiver()
        folder = letters_here(self.pascal_config)
        if folder is None:
            return
        self._request_dispatcher += TypeBasedDispatcher([(Letters, self.take_letters)])
        if self.recv_from_tokenizer is None:
            return
        parallel = get_parallel()
        box = Box(folder, parallel.dp_rank or 0, parallel.dp_size)
        stock = self.request_receiver
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
        self.request_receiver = PascalRequestReceiver(**fields, box=box)
        if self.idle_sleeper is not None:
            self.idle_sleeper.poller.register(box.socket, zmq.POLLIN)

    def take_letters(self, letters: Letters) -> None:
        if self.moves is not None:
            self.moves.hear(letters)
        else:
            location_replies.hear(self, letters)

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return PascalOutputStreamer

    def run_event_loop(self) -> None:
        try:
            super().run_event_loop()
        except Exception:
            if not (self.pascal_config.places and os.environ.get(POST_ENV)):
                raise
            # SGLang's way out takes the controller along, and with it every instance. Ours sees
            # that this process has ended, whatever would keep it from ending in order.
            logger.exception("pascal_sglang: instance %s failed", get_parallel().dp_rank)
            os._exit(1)

    def get_init_info(self) -> dict[str, Any]:
        """Tell the launcher which configuration really runs here (`frontend.require_handshake`)."""
        return introduced(super().get_init_info(), get_parallel().dp_rank or 0)

    def _create_generation_req(
        self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any
    ) -> Req:
        kwargs = with_default_budget(recv_req, kwargs, self.pascal_config.default_thinking_budget)
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.phase_tracker.arrived(req, getattr(recv_req.time_stats, "created_time", 0.0))
        if self.governor is not None:
            self.governor.members.arrived(req)
        return req

    def send_control_output(self, output: Any, recv_req: Any) -> None:
        """The controller answers for an instance that dies before it has."""
        super().send_control_output(output, recv_req)
        if self.herald is not None:
            self.herald.answered(recv_req)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self.governor is None:
            super()._add_request_to_queue(req, is_retracted=is_retracted)
            return
        with self.governor.admission.everybody():
            super()._add_request_to_queue(req, is_retracted=is_retracted)
            if self.waiting_queue and self.waiting_queue[-1] is req:
                self.governor.queued(req)

    def init_invariant_checker(self) -> None:
        """The pools exist by now: build the governor, and let SGLang's leak checks count the KV of
        requests on their way out."""
        super().init_invariant_checker()
        self.governor = build_governor(self, self.pascal_config)
        self.herald = build_herald(self, self.governor)
        if self.governor is not None:
            stock = self.invariant_checker
            fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
            self.invariant_checker = PascalInvariantChecker(**fields)
            self.invariant_checker.ladder = self.governor.ladder
            self.moves = build_moves(self, self.governor, self.pascal_config)
            self.governor.moves = self.invariant_checker.moves = self.moves
            if self.moves is not None:
                self.moves.locate = partial(location_replies.reply, self)

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> Any:
        if self.governor is not None:
            running_batch = self.governor.govern(running_batch, last_batch)
        plan = super().get_next_batch_to_run(running_batch=running_batch, last_batch=last_batch)
        if self.herald is not None:
            self.herald.tell(plan.batch_to_run)
        return plan

    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput, **kwargs: Any) -> Any:
        if self.herald is not None and not is_health_probe(recv_req):
            self.herald.received += 1
        return super().handle_generate_request(recv_req, **kwargs)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        if self.governor is not None:
            if self.governor.relieve(batch):
                batch.batch_is_full = False
                return (
                    None  # As SGLang does where finishing requests are about to give memory back.
                )
            # Read by `retract_decode`, which now strikes only what cannot be paused.
            batch._get_decode_retraction_order = self.governor.retraction_order
        try:
            updated: ScheduleBatch | None = super().update_running_batch(batch)
        finally:
            batch.__dict__.pop("_get_decode_retraction_order", None)
        return updated

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> Any:
        if self.governor is None:
            return super().get_new_batch_prefill(running_batch)
        with self.governor.admission.only_planned(self.governor.prefilled):
            return super().get_new_batch_prefill(running_batch)

    def _should_defer_prefill(self, running_batch: ScheduleBatch) -> bool:
        deferred: bool = super()._should_defer_prefill(running_batch)
        waits = bool(self.waiting_queue) or self.chunked_req is not None
        return deferred or (self.moves is not None and self.moves.defers_prefill(waits))

    def is_disable_overlap_for_batch(
        self, batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> bool:
        """Whoever has just arrived gets its first token before the next step, not after it."""
        disabled: bool = super().is_disable_overlap_for_batch(batch, last_batch=last_batch)
        if disabled or self.moves is None or not last_batch:
            return disabled
        return self.moves.arrivals.came_with(self.result_queue[0][0])

    def abort_request(self, recv_req: AbortReq) -> None:
        def matches(rid: str) -> bool:
            return recv_req.abort_all or rid.startswith(recv_req.rid)

        if self.moves is not None:
            self.moves.aborted("" if recv_req.abort_all else recv_req.rid, matches)
        # Marks those that run, and those that we hold, with the reason.
        super().abort_request(recv_req)
        if self.governor is None:
            return
        for req in self.governor.ladder.forget(lambda r: matches(r.rid)):
            self.end_early(req, None)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state[INIT_INFO_KEY] = self.pascal_status()
        return output

    def pascal_status(self) -> dict[str, Any]:
        """This instance for `GET /pascal/status`: counts by phase, KV tokens, requests."""
        live = [req for req in Scheduler.collect_inflight_reqs(self) if not req.finished()]
        governor = self.governor
        ladder = None if governor is None else governor.ladder
        paused = [] if ladder is None else [*ladder.leaving, *ladder.paused()]
        arriving = [] if ladder is None else ladder.arriving
        live = list(dict.fromkeys([*live, *paused, *arriving]))
        capacity = self.max_total_num_tokens
        free = self.token_to_kv_pool_allocator.available_size()
        return {
            "dp_rank": get_parallel().dp_rank or 0,
            "pid": os.getpid(),
            "policy": self.pascal_config.policy,
            "waiting": len(self.waiting_queue),
            "running": count_phases(live),
            "ended": dict(self.phase_tracker.outcomes),
            "kv_tokens": {
                "capacity": capacity,
                "free": free,
                "evictable": self.tree_cache.evictable_size(),
                "host": 0 if ladder is None else ladder.host_tokens,
            },
            "monitor": {} if governor is None else figures(self, governor, self.last_batch),
            "paused": len(paused),
            "pauses": {} if ladder is None else dict(ladder.counts),
            "costs": {} if ladder is None else ladder.costs.describe(),
            "decisions": {} if governor is None else dict(governor.journal.counts),
            "queued": {} if governor is None else by_class(governor.planner.line.lengths()),
            "migrations": None if self.moves is None else self.moves.describe(),
            "unpausable": {} if governor is None else dict(governor.members.unpausable),
            "policy_errors": 0 if governor is None else governor.errors,
            "queue_errors": 0 if governor is None else governor.admission.errors,
            "requests": [describe(req) for req in [*live, *self.waiting_queue]],
            "recent": list(self.phase_tracker.recent),
        }
