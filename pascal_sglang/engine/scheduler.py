"""Our scheduler: SGLang's, with every request's phase tracked."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, GetInternalStateReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.budget import with_default_budget
from pascal_sglang.engine.metrics import PhaseMetrics
from pascal_sglang.engine.phases import PhaseTracker, count_phases, describe
from pascal_sglang.frontend import INIT_INFO_KEY


class PascalOutputStreamer(SchedulerOutputStreamer):
    """Sees every request that produced tokens in a pass, streamed or not, before they leave."""

    tracker: PhaseTracker

    def stream_output(
        self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        self.tracker.observe((r for r in reqs if r is not skip_req), time.perf_counter())
        SchedulerOutputStreamer.stream_output(self, reqs, return_logprob, skip_req)


class PascalScheduler(Scheduler):
    """SGLang's scheduler under the policy of `PascalConfig`; `fcfs` only observes."""

    def __init__(self, server_args: Any, port_args: Any) -> None:
        config = PascalConfig.from_env()
        if config is None:
            raise RuntimeError("PascalScheduler started without PASCAL_SGLANG_CONFIG")
        self.pascal_config = config
        super().__init__(server_args, port_args)

    def init_output_streamer(self) -> None:
        reports = self.metrics_reporter.enable_metrics and get_parallel().attn_tp_rank == 0
        metrics = PhaseMetrics(self.metrics_collector.labels) if reports else None
        self.phase_tracker = PhaseTracker(metrics)
        super().init_output_streamer()
        self.output_streamer.tracker = self.phase_tracker

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return PascalOutputStreamer

    def get_init_info(self) -> dict[str, Any]:
        """Tell the launcher which configuration really runs here (`frontend.require_handshake`)."""
        return {**super().get_init_info(), INIT_INFO_KEY: self.pascal_config.to_json()}

    def _create_generation_req(
        self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any
    ) -> Req:
        kwargs = with_default_budget(recv_req, kwargs, self.pascal_config.default_thinking_budget)
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.phase_tracker.arrived(req, getattr(recv_req.time_stats, "created_time", 0.0))
        return req

    def send_abort_output(self, abort_req: AbortReq, req: Req) -> None:
        self.phase_tracker.ended(req, time.perf_counter(), aborted=True)
        super().send_abort_output(abort_req, req)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state[INIT_INFO_KEY] = self.pascal_status()
        return output

    def pascal_status(self) -> dict[str, Any]:
        """This instance for `GET /pascal/status`: counts by phase, KV tokens, requests."""
        live = [req for req in self.collect_inflight_reqs() if not req.finished()]
        capacity = self.max_total_num_tokens
        free = self.token_to_kv_pool_allocator.available_size()
        return {
            "dp_rank": get_parallel().dp_rank or 0,
            "policy": self.pascal_config.policy,
            "waiting": len(self.waiting_queue),
            "running": count_phases(live),
            "ended": dict(self.phase_tracker.outcomes),
            "kv_tokens": {
                "capacity": capacity,
                "free": free,
                "evictable": self.tree_cache.evictable_size(),
            },
            "requests": [describe(req) for req in [*live, *self.waiting_queue]],
            "recent": list(self.phase_tracker.recent),
        }
