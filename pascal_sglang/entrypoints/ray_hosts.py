"""Instances on several hosts of a Ray cluster, each whole on one of them.

SGLang 0.5.23 reaches the instances of a server through Unix sockets, so all of them have to be on
its host; it asks Ray for that and waits without end where they do not fit. But it can be given the
place of each GPU. So where the control sockets are open over TCP, we say which host gets which
instance, and bring what goes through the Unix sockets there (`cluster.remote_channels`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.placement_group import placement_group as create_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from sglang.srt.runtime_context import get_mm, get_parallel, get_serving

from pascal_sglang import clock
from pascal_sglang.cluster.control_channel import CONTROL_ENV
from pascal_sglang.cluster.control_keys import ControlKeys, own_secret
from pascal_sglang.cluster.remote_channels import HeadChannels, connect
from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints.ray_watch import Watched, watch
from pascal_sglang.handshake import PROCESS_KEY, REQUESTS_KEY
from pascal_sglang.instances import HOSTS_ENV, several_hosts
from pascal_sglang.older_sglang import install as install_older

if TYPE_CHECKING:
    from pascal_sglang.cluster.controller import PascalController as _Controller
else:
    # SGLang's class for Ray has it as its base.
    _Controller = object

logger = logging.getLogger(__name__)

# For Ray to give GPUs that it has, in seconds.
PLACED_S = 60.0
# An instance on another host that says nothing at all for so many seconds is given up. One whose
# scheduler is busy or hangs still says twice a second that it lives.
LOST_S = 7.0
RAY_AUTH_ENV = "RAY_AUTH_MODE"
# Of what one bundle takes of its host's own resource, by which Ray puts it there.
_A_LITTLE = 0.001


def gpus_of_hosts() -> list[tuple[str, int]]:
    """The hosts of the cluster, this one first: address and GPUs."""
    own = ray.util.get_node_ip_address()
    hosts: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = node["NodeManagerAddress"]
            hosts[address] = hosts.get(address, 0) + int(node["Resources"].get("GPU", 0))
    return sorted(hosts.items(), key=lambda host: (host[0] != own, host[0]))


def assign(hosts: Sequence[tuple[str, int]], instances: int, gpus: int) -> list[str]:
    """The host of each instance, which takes so many GPUs of one. Raises: RuntimeError."""
    room = [address for address, there in hosts for _ in range(there // gpus)]
    if len(room) < instances:
        seen = ", ".join(f"{there} on {address}" for address, there in hosts)
        raise RuntimeError(
            f"--use-ray needs {instances} times {gpus} GPUs, each time on one host, and Ray has "
            f"{seen}"
        )
    return room[:instances]


def place_instances() -> PlacementGroup | None:
    """Ray's placement of the instances; None where all of them fit on this host, as SGLang has it.
    Raises: RuntimeError where they fit nowhere, or with what is not carried between hosts;
    ConfigError for a host without a rack."""
    parallel = get_parallel()
    config = PascalConfig.from_env()
    assert config is not None
    os.environ.pop(HOSTS_ENV, None)
    instances, gpus = parallel.num_dp_ranks, parallel.tp_size * parallel.pp_size
    alone = instances == 1 or parallel.attn_dp_enabled or parallel.nnodes > 1
    if alone:
        return None
    hosts = gpus_of_hosts()
    if hosts[0][1] >= instances * gpus:
        return None
    if config.control_listen is None:
        raise RuntimeError(
            f"--use-ray needs {instances * gpus} GPUs on this host, where Ray has {hosts[0][1]}; "
            "instances on other hosts need --pascal-control-listen ADDRESS"
        )
    _check_carried(config)
    places = assign(hosts, instances, gpus)
    for address in places:
        config.rack_of(address)
    bundles = [{"GPU": 1, f"node:{address}": _A_LITTLE} for address in places for _ in range(gpus)]
    group = create_placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=PLACED_S)
    except ray.exceptions.GetTimeoutError:
        ray.util.remove_placement_group(group)
        raise RuntimeError(
            f"--use-ray: Ray did not give {len(bundles)} GPUs in {PLACED_S:.0f} s; others use them"
        ) from None
    os.environ[HOSTS_ENV] = ",".join(places)
    return group


def _check_carried(config: PascalConfig) -> None:
    """Raises: RuntimeError for what does not work between hosts."""
    problem = None
    if not config.places:
        problem = "need a policy that places requests, and no --load-balance-method"
    elif get_serving().tokenizer_worker_num > 1:
        problem = "do not work with --tokenizer-worker-num"
    elif config.can_migrate and config.kv_transport == "shm":
        problem = "do not work with --pascal-kv-transport shm, which is memory of one host"
    elif config.can_migrate and config.kv_transport != "auto" and config.kv_listen is None:
        problem = f"and --pascal-kv-transport {config.kv_transport} need --pascal-kv-listen ADDRESS"
    elif (transport := get_mm().mm_feature_transport) not in (None, "cpu"):
        problem = (
            f"do not work with --mm-feature-transport {transport}, which is memory of one host and "
            "which SGLang chooses for some models; give --mm-feature-transport cpu"
        )
    if problem is not None:
        raise RuntimeError(f"instances on several hosts {problem}")
    if os.environ.get(RAY_AUTH_ENV) != "token":
        logger.warning(
            "pascal_sglang: Ray asks nobody for a token, so all who reach its ports run code as "
            "this user: keep its network private, or set %s=token on all hosts",
            RAY_AUTH_ENV,
        )


# Of the controller in this process, by instance: what those on other hosts say comes in here.
_channels: dict[int, HeadChannels] = {}


def _keys() -> ControlKeys:
    return ControlKeys(own_secret(), os.environ[CONTROL_ENV].rpartition("/")[2])


def beside(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the actor of an instance on another host needs: `arguments` are those of
    `_create_scheduler_actor`, changed here. Raises: zmq.ZMQError if this host cannot listen."""
    if not several_hosts():
        return {}
    instance, ports = arguments["dp_rank"], arguments["port_args"]
    # Its ranks are on one host, and meet there.
    arguments["dist_init_addr"] = None
    if arguments["rank0_node_ip"] == ray.util.get_node_ip_address():
        return {"one_host": True}
    if instance not in _channels:
        config = PascalConfig.from_env()
        assert config is not None
        assert config.control_listen is not None
        port = _free_port_at(arguments["pg"], arguments["bundle_idx"], instance)
        _channels[instance] = HeadChannels(
            _keys(), config.control_listen, instance, replace(ports, nccl_port=port)
        )
    channels = _channels[instance]
    arguments["port_args"] = channels.port_args
    return {"one_host": True, "head": channels.endpoints}


def _free_port_at(group: PlacementGroup, bundle: int, instance: int) -> int:
    """A port of the loopback of a bundle's host that was free a moment ago. Raises: RuntimeError if
    that host does not say one."""

    @ray.remote(num_cpus=0, num_gpus=0)  # type: ignore[untyped-decorator]
    def free_port() -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle
    )
    try:
        found: int = ray.get(
            free_port.options(scheduling_strategy=strategy).remote(), timeout=PLACED_S
        )
    except ray.exceptions.GetTimeoutError:
        raise RuntimeError(
            f"--use-ray: the host of instance {instance} ran nothing for {PLACED_S:.0f} s"
        ) from None
    return found


def controller_class() -> Any:
    """The controller of instances that are Ray's actors."""
    # Not earlier: its base is to be our controller, which stands in SGLang's place by now.
    from sglang.srt.ray import data_parallel_controller

    install_older()  # It has only been imported now.

    class Controller(OverHosts, data_parallel_controller.RayDataParallelController):
        """SGLang's for Ray, with what is ours."""

        def schedulers(self, pids: list[int]) -> list[Watched]:
            # SGLang records what actors say of themselves in the order in which it makes them.
            actors, calls = self.scheduler_actors, self.event_loop_refs
            self._watched = watch(actors, calls, pids, self.errors)
            return self._watched

    return Controller


class OverHosts(_Controller):
    """A controller of instances that are actors, wherever they are. One on another host is given up
    when that is not heard any more, or cannot be: Ray takes half a minute to say so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _channels.clear()
        # Ids of processes mean nothing on another host.
        self._actors = 0
        self._watched: list[Watched] = []
        self._ticked_at = self._listened_since = clock.now()
        super().__init__(*args, **kwargs)

    def _record_scheduler_init_infos(self, infos: list[dict[str, Any]]) -> None:
        for info in infos:
            _, instance = info[PROCESS_KEY]
            self._actors += 1
            info[PROCESS_KEY] = (self._actors, instance)
            if (requests_at := info.get(REQUESTS_KEY)) is not None:
                self.workers[instance].close(linger=0)
                channels = _channels[instance]
                self.workers[instance] = connect(_keys(), requests_at, channels.close)
        super()._record_scheduler_init_infos(infos)

    def error_counts(self) -> Counter[str]:
        channels = list(_channels.values())
        return sum((each.error_counts() for each in channels), super().error_counts())

    def on_instance_down(self, instance: int) -> None:
        if (channels := _channels.get(instance)) is not None:
            channels.close()
        super().on_instance_down(instance)

    def _tick(self, now: float) -> None:
        super()._tick(now)
        if now - self._ticked_at > LOST_S / 2:
            # This process was held up itself: what came meanwhile is read first.
            self._listened_since = now
        self._ticked_at = now
        if self._stopping:
            return
        for instance in _channels.keys() - self.instance_failures.dead:
            channels = _channels[instance]
            reported = self.load_tracker.heard[instance] or 0.0
            heard_at = max(channels.heard_at, reported, self._listened_since)
            if channels.ended:
                self._give_up(instance, "is out of reach")
            elif now - heard_at > LOST_S:
                self._give_up(instance, f"said nothing for {LOST_S:.0f} s")

    def _give_up(self, instance: int, why: str) -> None:
        logger.error(
            "pascal_sglang: instance %d, on another host, %s, and is given up", instance, why
        )
        self.on_instance_down(instance)
        if not self._active_workers:
            self._over = "every instance has died"
        lost = [w for w in self._watched if self._instance_of_pid[w.pid] == instance]
        threading.Thread(target=_kill, args=(lost,), name="lost_actors", daemon=True).start()

    def event_loop(self) -> None:
        """It runs in a thread of the server, which is to end with it."""
        try:
            super().event_loop()
        except Exception:
            logger.exception("pascal_sglang: the controller has ended")
            os.kill(os.getpid(), signal.SIGQUIT)


def _kill(lost: Sequence[Watched]) -> None:
    for actor in lost:
        actor.kill()
