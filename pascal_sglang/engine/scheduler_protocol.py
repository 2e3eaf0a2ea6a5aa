"""What we use of SGLang's scheduler, so that `mypy` reads which attributes we touch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from sglang.srt.managers.io_struct import ShutdownReq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class SchedulerProtocol(Protocol):
    """A live scheduler; `patches/seams.toml` lists where each of these is SGLang's."""

    # Requests.
    waiting_queue: list[Req]
    running_batch: ScheduleBatch
    last_batch: ScheduleBatch | None
    chunked_req: Req | None
    grammar_manager: Any

    # KV and its pools. Counts of tokens.
    req_to_token_pool: Any
    token_to_kv_pool_allocator: Any
    tree_cache: Any
    page_size: int
    chunked_prefill_size: int | None
    max_total_num_tokens: int

    # Limits of requests.
    max_running_requests: int
    max_req_len: int

    # Priorities and the order of a prefill.
    policy: Any
    enable_priority_scheduling: bool
    enable_priority_preemption: bool
    schedule_low_priority_values_first: bool
    priority_scheduling_preemption_threshold: int

    # LoRA adapters.
    enable_lora: bool
    lora_drainer: Any
    tp_worker: Any

    # How steps run.
    device: Any
    enable_overlap: bool
    prefill_decode_interval: int | None
    forward_stream: Any
    forward_stream_ctx: AbstractContextManager[Any]
    future_map: Any
    attn_tp_cpu_group: Any

    # The model and the server.
    model_config: Any
    spec_algorithm: Any
    draft_worker: Any
    disaggregation_mode: Any
    is_generation: bool
    tokenizer: Any
    server_args: Any
    metrics_collector: Any
    metrics_reporter: Any
    _engine_paused: bool

    # Ours (`tp_ranks`).
    pascal_rank_state: Any

    def get_num_allocatable_reqs(self, running_bs: int, *, running_batch: ScheduleBatch) -> int:
        """Requests that may join a running batch of that many."""

    def can_schedule_lora_req(self, req: Req, running_loras: set[str | None]) -> bool:
        """Whether the request's adapter fits beside others, and is loaded."""

    def collect_inflight_reqs(self) -> set[Req]:
        """Every request that has begun and is not in the waiting queue."""

    def _release_aborted_request(self, req: Req) -> None:
        """Give back what a request holds outside of the KV pools."""

    def handle_shutdown(self, recv_req: ShutdownReq) -> None:
        """The loop ends with this pass."""

    def end_early(self, req: Req, problem: str | None) -> None:
        """End a request that holds no KV any more (`OperationsScheduler`)."""
