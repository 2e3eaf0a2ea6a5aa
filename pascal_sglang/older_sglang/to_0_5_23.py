"""From SGLang 0.5.22 to 0.5.23: extension points of the scheduler and of the controller."""

from __future__ import annotations

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
    """Fields that requests do not have yet."""
    module.Req._think_start_match_len = 0
    module.Req.mm_token_counts_ready = False
    module.Req.dllm_has_literal_mask = False
    module.ReqKvInfo.mamba_ping_pong_empty = None
    module.ReqKvInfo.mamba_untracked_decode_batch_idx = None


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
    "sglang.srt.managers.schedule_batch": _schedule_batch,
    "sglang.srt.managers.scheduler": _scheduler,
    "sglang.srt.managers.scheduler_components.flush_wrapper": _flush_wrapper,
    "sglang.srt.session.session_controller": _session,
    "sglang.srt.managers.data_parallel_controller": _controller,
    "sglang.srt.entrypoints.engine": _engine,
    "sglang.srt.ray.data_parallel_controller": _ray_controller,
    "sglang.srt.ray.engine": _ray_engine,
}
