"""Which host of a Ray cluster gets which instance, and what becomes of one that is out of reach."""

import functools
import os
from array import array
from types import SimpleNamespace

import pytest
import ray
import torch
import zmq
from ray.exceptions import ActorDiedError, RayTaskError
from sglang.srt.managers import mm_utils
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)

from pascal_sglang.cluster import watched_controller
from pascal_sglang.cluster.controller import PascalController
from pascal_sglang.cluster.forecast_files import FOLDER_ENV
from pascal_sglang.cluster.loop_errors import LoopErrors
from pascal_sglang.cluster.remote_channels import (
    METRICS_ENV,
    HeadChannels,
    InstanceChannels,
    connect,
)
from pascal_sglang.cluster.transport.listening import abort_connections
from pascal_sglang.config import ACTOR_ENV, ConfigError, PascalConfig
from pascal_sglang.entrypoints import ray_actors, ray_hosts, ray_watch
from pascal_sglang.entrypoints.preflight import idle_racks
from pascal_sglang.entrypoints.ray_hosts import OverHosts, assign
from pascal_sglang.instances import HOSTS_ENV
from tests.unit import test_remote_channels, test_watched_controller
from tests.unit.test_remote_channels import ADDRESS, Ports, connected
from tests.unit.test_watched_controller import BOUND_S, request

ended = test_remote_channels.ended
scene = test_watched_controller.scene
PAIR = [("10.0.0.1", 1), ("10.0.0.2", 1)]


@pytest.mark.parametrize(
    ("hosts", "instances", "gpus", "places"),
    [
        (PAIR, 2, 1, ["10.0.0.1", "10.0.0.2"]),
        # The head first, as far as its GPUs go; what is left there is too little for one.
        ([("h", 3), ("a", 4)], 3, 2, ["h", "a", "a"]),
        # A head without GPUs only serves.
        ([("h", 0), ("a", 1), ("b", 1)], 2, 1, ["a", "b"]),
    ],
)
def test_each_instance_is_whole_on_one_host(hosts, instances, gpus, places):
    assert assign(hosts, instances, gpus) == places


@pytest.mark.parametrize(("instances", "gpus"), [(3, 1), (1, 2)])
def test_what_fits_nowhere_is_refused_with_what_there_is(instances, gpus):
    said = f"needs {instances} times {gpus} GPUs, each time on one host, and Ray has 1 on 10.0.0.1,"
    with pytest.raises(RuntimeError, match=said):
        assign(PAIR, instances, gpus)


class Controller(OverHosts, PascalController):
    """As Ray's, of which the second instance is on another host."""

    far = None

    def _record(self, folder, ended):
        """In the place of starting actors."""
        names = [f"ipc://{folder}/{name}" for name in ("manager", "detokenizer")]
        ports = Ports(*names, f"test{os.getpid()}")
        channels = HeadChannels(ray_hosts._keys(), ADDRESS, 1, ports)
        ray_hosts._channels[1] = channels
        self.far = InstanceChannels(channels.endpoints, ports, ended.set)
        self.workers[1] = connect(ray_hosts._keys(), self.far.requests_at, channels.close)
        self._hosts.update({0: "head", 1: "other"})

    def event_loop(self):
        """A server ends with it."""
        PascalController.event_loop(self)


@pytest.fixture
def far(scene, ended, monkeypatch, tmp_path):
    """A server with its second instance on another host, and the scheduler's socket there."""
    for variable in (METRICS_ENV, FOLDER_ENV):
        monkeypatch.delenv(variable, raising=False)
    launch = test_watched_controller.Scene.launch

    def launch_far(one, controller):
        launch(one, controller)
        controller._record(tmp_path, ended)

    monkeypatch.setattr(test_watched_controller.Scene, "launch", launch_far)
    monkeypatch.setattr("pascal_sglang.instances.instance_count", lambda: 2)
    one = scene(of=Controller, control_listen=ADDRESS)
    scheduler = connected(zmq.PULL, one.controller.far.port_args.scheduler_input_ipc_name)
    yield one, scheduler
    for channels in ray_hosts._channels.values():
        channels.close()
    scheduler.close()


def is_given_up(one, rid):
    ended = one.hear(one.manager)
    assert (ended.rid, ended.finished_reason["status_code"]) == (rid, 503)
    assert "has died" in ended.finished_reason["message"]
    shown = one.controller.describe()
    assert shown["states"] == ["live", "dead"]
    one.send(request("after"))
    assert one.hear(one.instances[0]).rid == "after"


def break_off(one, monkeypatch):
    abort_connections(ADDRESS, [int(one.controller.far.requests_at.rpartition(":")[2])])


def fail_a_thread(one, monkeypatch):
    ray_hosts._channels[1]._forwarded.clear()
    to_tokenizer = connected(zmq.PUSH, one.controller.far.port_args.tokenizer_ipc_name)
    to_tokenizer.send(b"to nobody")


def say_nothing(one, monkeypatch):
    """As a host does that has been switched off."""
    monkeypatch.setattr(watched_controller, "WAKE_MS", 20)
    monkeypatch.setattr(ray_hosts, "LOST_S", 0.2)


@pytest.mark.parametrize("fault", [break_off, fail_a_thread, say_nothing])
def test_of_an_instance_that_is_out_of_reach_the_requests_end(far, fault, monkeypatch):
    one, scheduler = far
    one.send(request("a", routed_dp_rank=1))
    assert scheduler.poll(BOUND_S * 1000)
    scheduler.recv()
    fault(one, monkeypatch)
    is_given_up(one, "a")


def test_what_fails_in_its_channels_is_shown(far):
    one, _ = far
    ray_hosts._channels[1].errors.note("what an instance shows", ValueError("a name"))
    assert one.controller.describe()["errors"] == {"what an instance shows": 1}


def test_an_error_of_rays_does_not_end_the_watch(monkeypatch):
    calls = ["a", "b"]
    said = [ConnectionError("Ray"), (["a"], ["b"]), ConnectionError("Ray"), (["b"], [])]

    def wait(*_, **__):
        now = said.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda call: 1 // 0)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_watch, "AGAIN_S", 0.01)
    errors = LoopErrors()
    watched = ray_watch.watch(["actor", "other"], calls, [1, 2], errors)
    for one in watched:
        assert os.read(one.sentinel, 1) == b"."
        assert one.exitcode == "ZeroDivisionError"
    assert errors.counts == {"waiting for the end of actors": 2}


def test_an_actor_that_ray_does_not_end_is_no_error(monkeypatch):
    monkeypatch.setattr(ray, "kill", lambda actor: 1 // 0)
    ray_watch.Watched("actor", 1, -1).kill()


RACKS = "a=10.0.1.0/24,b=10.0.2.0/24,a=fd00::/64"


def test_racks_are_told_by_networks():
    config = PascalConfig(racks=RACKS)
    assert [config.rack_of(a) for a in ("10.0.1.9", "10.0.2.1", "fd00::7")] == ["a", "b", "a"]
    with pytest.raises(ConfigError, match=r"--pascal-racks says no rack for the host 10\.0\.3\.1"):
        config.rack_of("10.0.3.1")
    assert PascalConfig().rack_of("10.0.3.1") == ""


@pytest.mark.parametrize(
    "racks",
    ["", "a", "a=", "=10.0.0.0/8", "a=10.0.1.1/24", "a=10.0.0.0/33", "a=host", "a b=10.0.0.0/8",
     "a=10.0.0.0/8,", "a=10.0.0.0/8;b=11.0.0.0/8"],
)  # fmt: skip
def test_what_is_no_rack_is_refused(racks):
    with pytest.raises(ConfigError, match="racks must be RACK=NETWORK"):
        PascalConfig(racks=racks)


def test_a_host_is_in_one_rack():
    with pytest.raises(ConfigError, match="which have addresses in common"):
        PascalConfig(racks="a=10.0.0.0/8,b=10.1.0.0/16")


def test_racks_of_one_host_are_of_no_use():
    config = PascalConfig(racks=RACKS)
    assert "nothing uses --pascal-racks" in idle_racks(config, SimpleNamespace(use_ray=False))
    assert idle_racks(config, SimpleNamespace(use_ray=True)) is None


def test_the_controller_knows_where_each_instance_is(far):
    one, _ = far
    unknown = [{"host": "head", "rack": ""}, {"host": "other", "rack": ""}]
    assert one.controller.describe()["sites"] == unknown


def test_the_controller_knows_racks(scene, monkeypatch):
    monkeypatch.setenv(HOSTS_ENV, "10.0.1.1,10.0.2.1")
    launch = test_watched_controller.Scene.launch

    def launch_with_hosts(one, controller):
        launch(one, controller)
        controller._hosts.update({0: "head", 1: "other"})

    monkeypatch.setattr(test_watched_controller.Scene, "launch", launch_with_hosts)
    one = scene(racks=RACKS)
    sites = one.controller.describe()["sites"]
    assert sites == [{"host": "head", "rack": "a"}, {"host": "other", "rack": "b"}]


def test_of_an_actor_that_fails_at_its_start_the_cause_is_said():
    trace = "Traceback (most recent call last):\n  File ...\nValueError: no\n"
    failed = RayTaskError("__init__", trace, ValueError("no"), actor_id="a")
    said = f"Scheduler actor failed to initialize: {ActorDiedError(failed)}"
    assert ray_watch.last_words(said) == "an instance does not start: ValueError: no"
    assert ray_watch.last_words("--use-ray needs\n2 GPUs") == "--use-ray needs\n2 GPUs"


ENVIRONMENT = {
    "HF_TOKEN": "hf_private",
    "HUGGING_FACE_HUB_TOKEN": "hf_older",
    "SGLANG_API_KEY": "private",
    "SGLANG_STORE_PASSWORD": "private",
    "PASCAL_SGLANG_CONTROL_SECRET": "s" * 64,
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN_PATH": "/a/file",
    # A switch, which is read when the module is imported.
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "True",
    "PASCAL_SGLANG_CONFIG": "{}",
    "AWS_SECRET_ACCESS_KEY": "of no use there",
}
CREDENTIALS = dict(list(ENVIRONMENT.items())[:5])


def test_ray_is_given_no_credential_to_log(monkeypatch):
    """It logs the environment of its actors, but not the arguments of their constructors."""
    monkeypatch.setattr(os, "environ", dict(ENVIRONMENT))
    monkeypatch.setattr(ray_actors.engine, "SchedulerActor", None)
    made = []
    ray_actors.create_scheduler_actor(
        lambda **_: made.append(ray_actors.engine.SchedulerActor), dp_rank=0
    )
    (actor,) = made
    told = actor._actor_class._default_options["runtime_env"]["env_vars"]
    assert set(told) == {
        "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "PASCAL_SGLANG_CONFIG",
        ACTOR_ENV,
    }  # fmt: skip
    assert actor._more == {"credentials": CREDENTIALS}


def test_an_actor_has_its_credentials_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def load_plugins():
        assert CREDENTIALS.items() <= os.environ.items()
        raise ConfigError("far enough")

    monkeypatch.setattr(ray_actors, "load_plugins", load_plugins)
    with pytest.raises(ConfigError, match="far enough"):
        ray_actors.PascalSchedulerActor(server_args=None, port_args=None, credentials=CREDENTIALS)


def test_a_request_that_is_too_large_for_its_instance_counts_nowhere(far):
    one, _ = far
    for worker in one.controller.workers:
        worker._most_bytes = 1 << 14
    one.send(request("large", input_ids=array("q", range(1 << 14))))
    ended = one.hear(one.manager)
    assert ended.rid == "large"
    assert "are more than the 16384 that an instance" in ended.finished_reason["message"]
    assert [one.controller.load_tracker.dispatched(i) for i in range(2)] == [0, 0]
    assert one.controller.placed == {}
    assert len(one.controller.prefixes) == 0


def test_multimodal_features_go_with_the_request(far, monkeypatch):
    """Not as the name of shared memory, which is of one host."""
    one, scheduler = far
    stock = mm_utils.determine_tensor_transport_mode
    hooked = functools.partial(ray_actors.carry_features, stock)
    monkeypatch.setattr(mm_utils, "determine_tensor_transport_mode", hooked)
    monkeypatch.setattr(mm_utils, "_is_default_tensor_transport", None)
    monkeypatch.setattr(mm_utils, "get_serving", lambda: SimpleNamespace(skip_tokenizer_init=False))
    monkeypatch.setenv(HOSTS_ENV, "10.0.1.1,10.0.2.1")
    item = MultimodalDataItem(modality=Modality.IMAGE, hash=1, feature=torch.arange(12.0))
    inputs = MultimodalProcessorOutput(mm_items=[item])
    one.send(mm_utils.wrap_shm_features(request("a", routed_dp_rank=1, mm_inputs=inputs)))
    feature = one.hear(scheduler).mm_inputs.mm_items[0].feature
    assert torch.equal(feature, torch.arange(12.0))
    monkeypatch.delenv(HOSTS_ENV)
    assert ray_actors.carry_features(lambda: "cuda_ipc") == "cuda_ipc"


@pytest.mark.parametrize("transport", [None, "cpu", "cuda_ipc", "cuda_vmm"])
def test_features_in_memory_of_one_host_are_refused(monkeypatch, transport):
    monkeypatch.setattr(ray_hosts, "get_serving", lambda: SimpleNamespace(tokenizer_worker_num=1))
    given = SimpleNamespace(mm_feature_transport=transport)
    monkeypatch.setattr(ray_hosts, "get_mm", lambda: given)
    config = PascalConfig(control_listen=ADDRESS)
    if transport in (None, "cpu"):
        ray_hosts._check_carried(config)
        return
    with pytest.raises(RuntimeError, match=f"several hosts do not work with .*{transport}"):
        ray_hosts._check_carried(config)
