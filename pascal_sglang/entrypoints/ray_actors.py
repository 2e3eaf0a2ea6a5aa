"""SGLang's Ray backend under our configuration: scheduler actors in which the plugin is active.

SGLang's actors load no plugin and inherit the environment of the Ray node, not of the server that
starts them. Ours get this server's settings along, and refuse to start without the plugin.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import ray
from sglang.srt.plugins import load_plugins
from sglang.srt.ray import engine
from sglang.srt.ray.scheduler_actor import SchedulerActor
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.config import ACTOR_ENV
from pascal_sglang.entrypoints.http_server import shake_hands
from pascal_sglang.entrypoints.ray_watch import Watched, watch

logger = logging.getLogger(__name__)

FORWARDED = ("PASCAL_SGLANG_", "SGLANG_", "PROMETHEUS_", "OMP_NUM_THREADS", "HF_")


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """What an actor must know of its server's environment; it runs on another process's."""
    kept = {name: value for name, value in environ.items() if name.startswith(FORWARDED)}
    return {**kept, ACTOR_ENV: "1"}


class PascalSchedulerActor(SchedulerActor.__ray_metadata__.modified_class):
    """SGLang's scheduler actor, with the plugin loaded before the scheduler is built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Imported first: a child process hooks only what it has imported.
        importlib.import_module("sglang.srt.managers.scheduler")
        load_plugins()
        super().__init__(*args, **kwargs)

    def run_event_loop(self) -> None:
        """Serve until killed. SGLang's own asks CUDA for its device first, on a CPU too."""
        if self.scheduler.device == "cpu":
            self.scheduler.run_event_loop()
        else:
            super().run_event_loop()


def create_scheduler_actor(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `ray.engine._create_scheduler_actor`, which looks its class up when it is called."""
    environment = {"env_vars": forwarded(os.environ)}
    engine.SchedulerActor = ray.remote(runtime_env=environment)(PascalSchedulerActor)
    return original(*args, **kwargs)


def require_handshake(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `RayEngine._launch_scheduler_processes`: every actor must run our configuration.

    Raises: RuntimeError also where Ray has too few GPUs, which SGLang would wait for without end.
    """
    if kwargs.get("placement_group") is None and ray.util.get_current_placement_group() is None:
        _require_gpus()
    result, processes = original(*args, **kwargs)
    shake_hands(result.scheduler_infos)
    return result, processes


def _require_gpus() -> None:
    parallel = get_parallel()
    wanted = parallel.num_dp_ranks * parallel.tp_size * parallel.pp_size
    there = int(ray.cluster_resources().get("GPU", 0))
    if there < wanted:
        raise RuntimeError(
            f"--use-ray needs {wanted} GPUs and Ray has {there}; on CPUs its node declares them: "
            f"ray start --head --num-gpus {wanted}"
        )


def launch_instances(
    original: Callable[..., Any], cls: Any, server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `RayEngine._launch_dp_scheduler_processes`, which declares an address on the arguments
    that it is given. SGLang 0.5.23 has published these by then, and refuses; a copy it takes. The
    controller that it makes is looked up when it is called; ours sees actors die."""
    # Not earlier: its base is to be our controller, which stands in SGLang's place by now.
    from sglang.srt.ray import data_parallel_controller

    class Controller(data_parallel_controller.RayDataParallelController):
        def schedulers(self, pids: list[int]) -> list[Watched]:
            # SGLang records what actors say of themselves in the order in which it makes them.
            return watch(self.scheduler_actors, self.event_loop_refs, pids)

        def event_loop(self) -> None:
            """It runs in a thread of the server, which is to end with it."""
            try:
                super().event_loop()
            except Exception:
                logger.exception("pascal_sglang: the controller has ended")
                os.kill(os.getpid(), signal.SIGQUIT)

    data_parallel_controller.RayDataParallelController = Controller
    return original(cls, copy.deepcopy(server_args), *args, **kwargs)


def start_cpu_monitor(original: Callable[..., Any], component: str, *args: Any) -> Any:
    """Around `start_cpu_monitor_thread`: with Ray the controller lives in the server's process,
    which counts its CPU seconds once, under the tokenizer's name; SGLang fails on counting twice.
    """
    return None if component == "data_parallel_controller" else original(component, *args)
