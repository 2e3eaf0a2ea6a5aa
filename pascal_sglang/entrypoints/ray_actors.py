"""SGLang's Ray backend under our configuration: scheduler actors in which the plugin is active.

SGLang's actors load no plugin and inherit the environment of the Ray node, not of the server that
starts them. Ours get this server's settings along, and refuse to start without the plugin.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import ray
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.plugins import load_plugins
from sglang.srt.ray import engine
from sglang.srt.ray.scheduler_actor import SchedulerActor
from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster.remote_channels import HeadEndpoints, InstanceChannels
from pascal_sglang.config import ACTOR_ENV
from pascal_sglang.entrypoints.http_server import hand_out_ways, shake_hands
from pascal_sglang.entrypoints.ray_hosts import beside, controller_class, place_instances
from pascal_sglang.entrypoints.ray_watch import last_words
from pascal_sglang.handshake import REQUESTS_KEY
from pascal_sglang.instances import instance_count, own_instance, several_hosts, speaks

logger = logging.getLogger(__name__)

FORWARDED = (
    "PASCAL_SGLANG_",
    "SGLANG_",
    "PROMETHEUS_",
    "OMP_NUM_THREADS",
    "HF_",
    "HUGGING_FACE_HUB_TOKEN",
)
# How names of credentials end. Names of switches may end so too; these are their values.
CREDENTIALS = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD")
SWITCHED = ("", "0", "1", "false", "true", "no", "yes", "off", "on")


def forwarded(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What an actor must know of its server's environment; it runs on another process's. Ray writes
    the first part into command lines and logs, so credentials, the second, go another way."""
    kept = {name: value for name, value in environ.items() if name.startswith(FORWARDED)}
    credentials = {
        name: value
        for name, value in kept.items()
        if name.endswith(CREDENTIALS) and value.lower() not in SWITCHED
    }
    settings = {name: value for name, value in kept.items() if name not in credentials}
    return {**settings, ACTOR_ENV: "1"}, credentials


class PascalSchedulerActor(SchedulerActor.__ray_metadata__.modified_class):
    """SGLang's scheduler actor, with the plugin loaded before the scheduler is built."""

    def __init__(
        self,
        *,
        server_args: Any,
        port_args: Any,
        credentials: Mapping[str, str] | None = None,
        one_host: bool = False,
        head: HeadEndpoints | None = None,
        **kwargs: Any,
    ) -> None:
        """one_host: the ranks of its instance are on one host. head: where the server's other
        processes take what it says, if they are on another."""
        os.environ.update(credentials or {})
        # Imported first: a child process hooks only what it has imported.
        importlib.import_module("sglang.srt.managers.scheduler")
        load_plugins()
        self._channels: InstanceChannels | None = None
        if head is not None:
            self._channels = InstanceChannels(head, port_args)
            port_args = self._channels.port_args
        if one_host:
            # SGLang names a port of the network that asks nobody who connects.
            declare_resolution(server_args, "pascal_sglang", dist_init_addr=None)
        super().__init__(server_args=server_args, port_args=port_args, **kwargs)

    def get_info(self) -> dict[str, Any]:
        """What the scheduler says at start, and where it takes requests, if on another host."""
        info: dict[str, Any] = super().get_info()
        if self._channels is None:
            return info
        self._channels.show(own_instance(), instance_count(), speaks=speaks())
        where = {REQUESTS_KEY: self._channels.requests_at} if speaks() else {}
        return info | where

    def run_event_loop(self) -> None:
        """Serve until killed. SGLang's own asks CUDA for its device first, on a CPU too."""
        if self.scheduler.device == "cpu":
            self.scheduler.run_event_loop()
        else:
            super().run_event_loop()


class WithArguments:
    """An actor class, or what its `options` make, whose constructor is given `more` too, as
    credentials: an argument goes to the actor alone."""

    def __init__(self, actor_class: Any, more: Mapping[str, Any]) -> None:
        self._actor_class, self._more = actor_class, more

    def options(self, **options: Any) -> WithArguments:
        return WithArguments(self._actor_class.options(**options), self._more)

    def remote(self, **kwargs: Any) -> Any:
        return self._actor_class.remote(**kwargs, **self._more)


def create_scheduler_actor(original: Callable[..., Any], **kwargs: Any) -> Any:
    """Around `ray.engine._create_scheduler_actor`, which looks its class up when it is called."""
    settings, credentials = forwarded(os.environ)
    more = {"credentials": credentials, **beside(kwargs)}
    actor_class = ray.remote(runtime_env={"env_vars": settings})(PascalSchedulerActor)
    engine.SchedulerActor = WithArguments(actor_class, more)
    return original(**kwargs)


def require_handshake(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `RayEngine._launch_scheduler_processes`: every actor must run our configuration.

    Raises: RuntimeError also where Ray has too few GPUs, which SGLang would wait for without end.
    """
    if kwargs.get("placement_group") is None and ray.util.get_current_placement_group() is None:
        _require_gpus()
        kwargs["placement_group"] = place_instances()
    hand_out_ways()
    try:
        result, processes = original(*args, **kwargs)
    except RuntimeError as error:
        raise RuntimeError(last_words(str(error))) from error
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
    from sglang.srt.ray import data_parallel_controller

    data_parallel_controller.RayDataParallelController = controller_class()
    return original(cls, copy.deepcopy(server_args), *args, **kwargs)


def carry_features(original: Callable[..., str], *args: Any) -> str:
    """Around `determine_tensor_transport_mode`: SGLang sends multimodal features as names of shared
    memory unless one instance is on several nodes. Here instances are, so they go with the request.
    """
    return "default" if several_hosts() else original(*args)


def start_cpu_monitor(original: Callable[..., Any], component: str, *args: Any) -> Any:
    """Around `start_cpu_monitor_thread`: with Ray the controller lives in the server's process,
    which counts its CPU seconds once, under the tokenizer's name; SGLang fails on counting twice.
    """
    return None if component == "data_parallel_controller" else original(component, *args)
