"""From SGLang 0.5.22 to 0.5.23: extension points of the scheduler and of the controller."""

from __future__ import annotations

import sys
from typing import Any

from pascal_sglang.older_sglang.source_patch import patch

SEND = "self.ipc_channels.send_to_tokenizer.send_output("
# Methods of the scheduler that end a request outside of the output stream.
ABORTING = (
    "_handle_generate_request",
    "_set_or_validate_priority",
    "_abort_on_queued_limit",
    "process_pending_chunked_abort",
    "update_running_batch",
    "abort_request",
)


def _scheduler(module: Any) -> None:
    def create_generation_req(self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        return module.Req(*args, **kwargs)

    def send_output(self: Any, output: Any, req: Any) -> None:
        self.ipc_channels.send_to_tokenizer.send_output(output, req)

    scheduler = module.Scheduler
    scheduler._create_generation_req = create_generation_req
    scheduler.send_abort_output = scheduler.send_control_output = send_output
    patch(
        scheduler,
        "_handle_generate_request",
        ("req = Req(", "req = self._create_generation_req(recv_req, "),
        (
            "session.create_req(",
            "session.create_req(lambda *a, **k: self._create_generation_req(recv_req, *a, **k), ",
        ),
    )
    for name in ABORTING:
        patch(scheduler, name, (SEND, "self.send_abort_output("))
    patch(scheduler, "process_input_requests", (SEND, "self.send_control_output("))
    patch(
        scheduler,
        "_should_defer_prefill",
        ("_should_defer_prefill(self)", "_should_defer_prefill(self, running_batch)"),
    )
    patch(
        scheduler,
        "get_next_batch_to_run",
        ("self._should_defer_prefill()", "self._should_defer_prefill(running_batch)"),
    )


def _session(module: Any) -> None:
    patch(
        module.Session,
        "create_req",
        ("    self,\n", "    self, req_factory,\n"),
        ("new_req = Req(", "new_req = req_factory("),
    )


def _flush_wrapper(module: Any) -> None:
    """A flush that waits is answered like one at once."""
    patch(
        module.SchedulerFlushWrapper,
        "check_pending",
        (
            "self._ipc_channels.send_to_tokenizer.send_output(",
            "self._flush_cache.__self__.send_control_output(",
        ),
    )


def _schedule_batch(module: Any) -> None:
    """Fields that requests do not have yet, and states of recurrent layers on a CPU."""
    module.Req._think_start_match_len = 0
    module.Req.mm_token_counts_ready = False
    module.Req.dllm_has_literal_mask = False

    def empty(self: Any) -> list[bool] | None:
        slots = self.mamba_ping_pong_track_buffer
        return None if slots is None else [slot == -1 for slot in slots.tolist()]

    # Memory that only a device needs.
    pinned = ("pin_memory=True", 'pin_memory=all_buffers.device.type != "cpu"')
    patch(module, "set_mamba_track_indices_from_reqs", pinned)
    module.ReqKvInfo.mamba_ping_pong_empty = property(empty, lambda self, value: None)
    module.ReqKvInfo.mamba_untracked_decode_batch_idx = property(
        lambda self: None, lambda self, value: None
    )


def _memory_pool(module: Any) -> None:
    """Only pools of another class have scales beside MLA's KV."""
    module.MLATokenToKVPool.kv_scale_buffer = None


def _pool_stats(module: Any) -> None:
    """Only pools of sliding windows say their capacity."""
    stock = module.SchedulerPoolStatsObserver.get_pool_stats

    def get_pool_stats(self: Any) -> Any:
        stats = stock(self)
        if stats.full_capacity is None:
            stats.full_capacity = self.max_total_num_tokens
            if stats.is_hybrid_ssm:
                size = self.token_to_kv_pool_allocator.size
                stats.full_capacity = self.req_to_token_pool.schedulable_token_capacity(size)
        return stats

    module.SchedulerPoolStatsObserver.get_pool_stats = get_pool_stats


def _base_prefix_cache(module: Any) -> None:
    """A draft model has no windows of its own yet."""
    module.BasePrefixCache.swa_retain_window = property(lambda self: self.sliding_window_size)


def _platforms(module: Any) -> None:
    """A platform may have a worker of its own for speculative decoding, or prepare SGLang's."""
    module.SRTPlatform.get_speculative_worker_cls = lambda self, algorithm: None


def _parallel_state(module: Any) -> None:
    """A platform says whether its ranks talk over NCCL; that of no other package does here."""
    stock = module.init_model_parallel_group

    def init_model_parallel_group(*args: Any, use_pynccl: bool | None = None, **kwargs: Any) -> Any:
        from sglang.srt.platforms import current_platform

        if use_pynccl is None and current_platform.is_out_of_tree():
            use_pynccl = False
        return stock(*args, use_pynccl=use_pynccl, **kwargs)

    module.init_model_parallel_group = init_model_parallel_group


def _speculative_hook(module: Any) -> None:
    """A platform is asked whether it serves a draft model before SGLang chooses what runs with
    one. What it says decides nothing yet."""
    stock = module._handle_eagle_family

    def handle_eagle_family(server_args: Any) -> None:
        from sglang.srt.platforms import current_platform

        if current_platform.is_out_of_tree():
            algorithm = module.resolving_view(server_args).speculative_algorithm
            current_platform.supports_speculative_algorithm(algorithm)
        stock(server_args)

    module._handle_eagle_family = handle_eagle_family


def _spec_info(module: Any) -> None:
    algorithm = module.SpeculativeAlgorithm
    stock = algorithm.create_worker

    def create_worker(self: Any, server_args: Any) -> Any:
        from sglang.srt.platforms import current_platform as platform

        made = None
        if platform.is_out_of_tree():
            made = platform.get_speculative_worker_cls(algorithm=self.name)
        return stock(self, server_args) if made is None else made

    algorithm.create_worker = create_worker


class _Kernel:
    """What is launched as a kernel, called as the function that a platform puts in its place."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getitem__(self, grid: Any) -> Any:
        def launch(
            rows: Any,
            table: Any,
            lengths: Any,
            out: Any,
            row_len: int,
            topk: int,
            columns: int,
            **_: Any,
        ) -> None:
            function = self.module.assign_draft_cache_locs_contiguous_func
            function(rows, table, lengths, out, topk, columns)

        return launch


def _eagle_worker_common(module: Any) -> None:
    """A kernel by the name of the function that a platform may replace. There is none but on CUDA
    and its like."""
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree():
        module.assign_draft_cache_locs_contiguous_func = None
        module.assign_draft_cache_locs_contiguous = _Kernel(module)


def _eagle_utils(module: Any) -> None:
    """The same. What samples drafts is looked up in a compiled package, whatever a platform has."""
    if not hasattr(module, "sgl_build_tree_kernel_efficient"):
        module.build_tree_kernel_efficient_func = None
        module.sgl_build_tree_kernel_efficient = lambda *args: (
            module.build_tree_kernel_efficient_func(*args)
        )
        module.tree_speculative_sampling_target_only = None
        module.top_k_renorm_prob = module.top_p_renorm_prob = None


def _eagle_worker(module: Any) -> None:
    """On a CPU no draft model has graphs, whoever's platform that is."""
    patch(
        module.EagleDraftWorker,
        "_capture_cuda_graphs",
        ("if _is_cpu or", 'if self.target_worker.device == "cpu" or'),
    )


def _linear_attention(module: Any) -> None:
    """Where a kernel is."""
    from sglang.kernels.ops.attention.fla import fused_gdn_gating

    module.fused_gdn_gating = fused_gdn_gating
    sys.modules[f"{module.__name__}.fused_gdn_gating"] = fused_gdn_gating


FIGURES = ("max_total_num_tokens", "max_req_input_len", "startup_time")
FROM_CONTROLLER = "".join(f'            "{name}": controller.{name},\n' for name in FIGURES)


def _controller(module: Any) -> None:
    def record(self: Any, infos: list[dict[str, Any]]) -> None:
        known = self.__dict__.setdefault("_scheduler_init_infos", [])
        known.extend(infos)
        self.max_total_num_tokens = infos[0]["max_total_num_tokens"]
        self.max_req_input_len = infos[0]["max_req_input_len"]
        times = (info.get("startup_time") for info in known)
        self.startup_time = module.aggregate_scheduler_startup_times(times)

    def init_info(self: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIGURES}

    controller = module.DataParallelController
    controller._record_scheduler_init_infos = record
    controller.get_init_info = init_info
    patch(
        controller,
        "launch_tensor_parallel_group",
        (
            '    self.max_total_num_tokens = scheduler_info[0]["max_total_num_tokens"]\n'
            '    self.max_req_input_len = scheduler_info[0]["max_req_input_len"]\n'
            "    self.startup_time = aggregate_scheduler_startup_times(\n"
            '        info.get("startup_time") for info in scheduler_info\n'
            "    )\n",
            "    self._record_scheduler_init_infos(scheduler_info)\n",
        ),
    )
    patch(
        module,
        "run_data_parallel_controller_process",
        (FROM_CONTROLLER, "            **controller.get_init_info(),\n"),
    )


def run_controller(*args: Any, **kwargs: Any) -> None:
    """The controller's process: loads plugins before the function that it runs is looked up."""
    from sglang.srt.managers import data_parallel_controller
    from sglang.srt.plugins import load_plugins

    load_plugins()
    data_parallel_controller.run_data_parallel_controller_process(*args, **kwargs)


def _tokenizer_control(module: Any) -> None:
    """No route asks for layouts of the cache yet."""

    async def get_hicache_l3_cache_layout(self: Any) -> list[dict[str, Any]]:
        raise NotImplementedError

    module.TokenizerControlMixin.get_hicache_l3_cache_layout = get_hicache_l3_cache_layout


def _engine(module: Any) -> None:
    module.run_data_parallel_controller_process = run_controller


def _ray_controller(module: Any) -> None:
    patch(
        module.RayDataParallelController,
        "_launch_ray_tp_group",
        (
            '        self.max_total_num_tokens = scheduler_infos[0]["max_total_num_tokens"]\n'
            '        self.max_req_input_len = scheduler_infos[0]["max_req_input_len"]\n'
            "        self.startup_time = aggregate_scheduler_startup_times(\n"
            "            [self.startup_time]\n"
            '            + [info.get("startup_time") for info in scheduler_infos]\n'
            "        )\n",
            "        self._record_scheduler_init_infos(scheduler_infos)\n",
        ),
    )


def _ray_engine(module: Any) -> None:
    figures = "".join(f'            "{name}": controller.{name},\n' for name in FIGURES)
    patch(
        module.RayEngine,
        "_launch_dp_scheduler_processes",
        (f"[\n        {{\n{figures}        }}\n    ]\n", "[controller.get_init_info()]\n"),
    )


PARTS = {
    "sglang.srt.platforms.interface": _platforms,
    "sglang.srt.distributed.parallel_state": _parallel_state,
    "sglang.srt.arg_groups.speculative_hook": _speculative_hook,
    "sglang.srt.speculative.spec_info": _spec_info,
    "sglang.srt.speculative.eagle_utils": _eagle_utils,
    "sglang.srt.speculative.eagle_worker_common": _eagle_worker_common,
    "sglang.srt.speculative.eagle_worker_v2": _eagle_worker,
    "sglang.kernels.ops.attention.linear": _linear_attention,
    "sglang.srt.mem_cache.base_prefix_cache": _base_prefix_cache,
    "sglang.srt.mem_cache.memory_pool": _memory_pool,
    "sglang.srt.managers.scheduler_components.pool_stats_observer": _pool_stats,
    "sglang.srt.managers.schedule_batch": _schedule_batch,
    "sglang.srt.managers.scheduler": _scheduler,
    "sglang.srt.managers.scheduler_components.flush_wrapper": _flush_wrapper,
    "sglang.srt.session.session_controller": _session,
    "sglang.srt.managers.tokenizer_control_mixin": _tokenizer_control,
    "sglang.srt.managers.data_parallel_controller": _controller,
    "sglang.srt.entrypoints.engine": _engine,
    "sglang.srt.ray.data_parallel_controller": _ray_controller,
    "sglang.srt.ray.engine": _ray_engine,
}
