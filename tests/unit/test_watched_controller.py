"""Our controller with instances that are mere sockets: no message and no death ends it or holds it
up. It is told of deaths as Ray's actors tell it, by a pipe."""

import argparse
import os
import signal
import threading
import time
from array import array
from types import SimpleNamespace

import pytest
import zmq
from sglang.srt.managers import io_struct as io
from sglang.srt.managers.data_parallel_controller import DataParallelController, LoadBalanceMethod
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.watchdog import Watchdog

from pascal_sglang.cluster import controller as controller_module
from pascal_sglang.cluster import load_tracker
from pascal_sglang.cluster.control_channel import CONTROL_ENV, CONTROLLER, ControlSender
from pascal_sglang.cluster.control_keys import SECRET_ENV
from pascal_sglang.cluster.control_replies import reply_for
from pascal_sglang.cluster.controller import PascalController
from pascal_sglang.cluster.messages import ControlAnswered
from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.unit.test_cluster import status

BOUND_S = 30


class Process:
    """A scheduler that does nothing but end."""

    def __init__(self, pid):
        self.pid, self.exitcode = pid, None
        self.sentinel, self.bell = os.pipe()

    def join(self):
        """It has ended when its sentinel says so."""

    def end(self, exitcode=-signal.SIGKILL):
        self.exitcode = exitcode
        os.write(self.bell, b".")


class Scene:
    """A controller in a thread, its tokenizer manager, and two instances. of: the controller's
    class."""

    def __init__(self, folder, monkeypatch, *, of=PascalController, together=False, **settings):
        monkeypatch.setenv(CONFIG_ENV, PascalConfig(**settings).to_json())
        monkeypatch.setenv(CONTROL_ENV, "")  # Put back afterwards: the controller sets it.
        monkeypatch.setenv(SECRET_ENV, "0" * 64)
        monkeypatch.setattr(
            controller_module, "get_observability", lambda: SimpleNamespace(enable_metrics=False)
        )
        monkeypatch.setattr(DataParallelController, "__init__", lambda c, _: self.launch(c))
        watched = "pascal_sglang.cluster.watched_controller"
        monkeypatch.setattr(f"{watched}.step_together", lambda: together)
        self.context = zmq.Context()
        self.folder = folder
        self.processes = [Process(pid) for pid in (101, 102)]
        self.manager = self.context.socket(zmq.PULL)
        self.manager.bind(self.address("manager"))
        handler = signal.getsignal(signal.SIGQUIT)
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        server_args = parser.parse_args(["--model-path", "m", "--dp-size", "2"])
        try:
            self.controller = of(server_args)
        except BaseException:
            self.context.destroy(linger=0)  # The interpreter would wait for its sockets.
            raise
        signal.signal(signal.SIGQUIT, handler)
        self.requests = self.context.socket(zmq.PUSH)
        self.requests.connect(self.address("requests"))
        self.instances = []
        for index in range(2):
            self.instances.append(self.context.socket(zmq.PULL))
            self.instances[-1].connect(self.address(index))
        self.error = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def address(self, name):
        return f"ipc://{self.folder}/{name}"

    def launch(self, controller):
        """In the place of SGLang's constructor: what it leaves behind, without processes."""
        controller.server_args = SimpleNamespace(served_model_name="m")
        controller.port_args = SimpleNamespace(tokenizer_ipc_name=self.address("manager"))
        controller.context = self.context
        controller.recv_from_tokenizer = self.context.socket(zmq.PULL)
        controller.recv_from_tokenizer.bind(self.address("requests"))
        controller.workers = [self.context.socket(zmq.PUSH) for _ in range(2)]
        for index, worker in enumerate(controller.workers):
            worker.setsockopt(zmq.SNDHWM, 0)
            worker.bind(self.address(index))
        controller.status, controller.dp_active = [True, True], [True, True]
        controller._active_workers = [0, 1]
        controller.control_message_step = 1
        controller.load_balance_method = LoadBalanceMethod.ROUND_ROBIN
        controller.refresh_load_budget_on_dispatch = False
        controller.scheduler_procs = self.processes
        controller._instance_of_pid.update({101: 0, 102: 1})
        controller.soft_watchdog = Watchdog.create("test", None)
        controller.dispatching = controller.round_robin_scheduler
        controller.round_robin_counter = 0
        controller.init_dispatcher()

    def run(self):
        try:
            self.controller.event_loop()
        except RuntimeError as error:
            self.error = str(error)

    def kill(self, index):
        """The kernel closes its sockets, and the controller's sentinel becomes readable."""
        self.instances[index].close(linger=0)
        self.processes[index].end()

    def send(self, message):
        io.sock_send(self.requests, message)

    def hear(self, socket):
        assert socket.poll(BOUND_S * 1000), "nothing came"
        return io.sock_recv(socket)

    def close(self):
        self.controller._over = self.controller._over or "the test is over"
        self.thread.join(BOUND_S)
        self.controller._folder.remove()
        self.context.destroy(linger=0)
        assert not self.thread.is_alive()


@pytest.fixture
def scene(tmp_path, monkeypatch):
    made = []

    def make(**settings):
        made.append(Scene(tmp_path, monkeypatch, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def request(rid, **more):
    fields = dict.fromkeys(io.TokenizedGenerateReqInput.__struct_fields__[2:13])
    fields |= {"input_ids": array("q", [1, 2, 3]), "sampling_params": SamplingParams()}
    fields |= {"return_logprob": False, "logprob_start_len": 0, "top_logprobs_num": 0}
    return io.TokenizedGenerateReqInput(rid=rid, **{**fields, "stream": False, **more})


def batch(count):
    return io.BatchTokenizedGenerateReqInput(batch=[request(f"r{i}") for i in range(count)])


def aborted(scene, count):
    """The ids of as many requests that end, each with a clear error."""
    ended = [scene.hear(scene.manager) for _ in range(count)]
    for message in ended:
        assert message.finished_reason["status_code"] == 503
        assert "has died" in message.finished_reason["message"]
    return [message.rid for message in ended]


def test_an_instance_that_dies_while_a_batch_is_placed_holds_nothing_up(scene):
    one, count = scene(), 1500
    one.send(batch(count))
    one.hear(one.instances[1])
    one.kill(1)
    began = time.monotonic()
    placed = []
    lost = []
    while len(placed) + len(lost) < count:
        assert time.monotonic() - began < BOUND_S
        if one.instances[0].poll(1):
            placed.append(io.sock_recv(one.instances[0]).rid)
        if one.manager.poll(1):
            lost += aborted(one, 1)
    assert sorted(placed + lost) == sorted(f"r{i}" for i in range(count))
    assert placed
    assert lost


def test_a_controller_that_stood_still_hears_first_and_calls_nobody_silent(scene, monkeypatch):
    """What instances said meanwhile lies unread. Clients would hear 503 of `/health`, and of moves
    whose outcome is among it."""
    monkeypatch.setattr(load_tracker, "SILENT_S", 0.3)
    one, seen, steps = scene(), [], iter("SS")
    controller = one.controller
    place = controller.control_receiver.place
    senders = [ControlSender(place, index) for index in range(2)]
    shows = controller.status_file.show

    def show(now, what):
        if all(at is not None for at in controller.load_tracker.heard):
            seen.append(controller.silent())
        shows(now, what)

    def wake_ms():
        if next(steps, None):
            for index, sender in enumerate(senders):
                assert sender.send(CONTROLLER, status(dp_rank=index))
            time.sleep(0.4)
        return 10

    monkeypatch.setattr(controller.status_file, "show", show)
    monkeypatch.setattr(controller, "wake_ms", wake_ms)
    one.send(request("a"))  # Wakes it.
    deadline = time.monotonic() + BOUND_S
    while len(seen) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen[:2] == [[], []]


def test_a_request_for_a_dead_instance_ends_alone(scene):
    one = scene()
    one.kill(1)
    one.send(request("a", routed_dp_rank=1, http_worker_ipc="ipc://worker"))
    ended = one.hear(one.manager)
    assert (ended.rid, ended.http_worker_ipc) == ("a", "ipc://worker")
    assert ended.finished_reason["message"] == "Instance 1 has died."
    one.send(request("b", routed_dp_rank=0))
    assert one.hear(one.instances[0]).rid == "b"
    assert one.controller.errors.counts == {}


def test_a_death_tells_the_right_tokenizer_worker(scene):
    one = scene()
    one.send(request("a", routed_dp_rank=1, http_worker_ipc="ipc://worker"))
    one.hear(one.instances[1])
    one.kill(1)
    assert one.hear(one.manager).http_worker_ipc == "ipc://worker"


def test_no_message_ends_the_loop(scene, monkeypatch):
    one = scene()
    monkeypatch.setattr(one.controller.prefixes, "hits", lambda blocks: 1 // 0)
    one.requests.send(b"\xc1 nothing that can be read")
    one.send(request("a"))
    ended = one.hear(one.manager)
    assert (ended.rid, ended.finished_reason["status_code"]) == ("a", 503)
    one.send(io.ActiveRanksOutput(status=[True]))
    one.send(request("b", routed_dp_rank=0))
    assert one.hear(one.instances[0]).rid == "b"
    counts = {"unreadable request": 1, "dispatch": 1, "ActiveRanksOutput": 1}
    assert one.controller.errors.counts == counts
    assert one.controller.describe()["errors"] == one.controller.errors.counts


@pytest.mark.parametrize(
    "asked",
    [
        io.FlushCacheReqInput(),
        io.ClearHiCacheReqInput(),
        io.AttachHiCacheStorageReqInput(hicache_storage_backend="file"),
        io.DetachHiCacheStorageReqInput(),
        io.AddExternalCorpusReqInput(corpus_id="c", token_chunks=[[1]]),
        io.RemoveExternalCorpusReqInput(corpus_id="c"),
        io.ListExternalCorporaReqInput(),
        *([io.GetHiCacheL3LayoutReq()] if hasattr(io, "GetHiCacheL3LayoutReq") else []),
    ],
    ids=lambda asked: type(asked).__name__,
)
def test_for_a_dead_instance_the_controller_answers_control_requests(scene, asked):
    one, kind = scene(), type(asked)
    one.send(asked)
    assert isinstance(one.hear(one.instances[1]), kind)
    one.kill(1)
    control_sender = ControlSender(one.controller._folder.path, 0)
    for _ in range(2):
        assert isinstance(one.hear(one.instances[0]), kind)
        control_sender.send(CONTROLLER, ControlAnswered(0, kind.__name__))
        assert one.hear(one.manager) == reply_for(kind, 1, "dead")
        one.send(asked)


def test_the_last_instance_takes_the_controller_along(scene):
    one = scene()
    one.send(request("a", routed_dp_rank=1))
    one.hear(one.instances[1])
    one.kill(0)
    one.kill(1)
    assert aborted(one, 1) == ["a"]
    one.thread.join(BOUND_S)
    assert one.error == "every instance has died"


def test_under_sglangs_own_balancing_any_death_ends_the_controller(scene):
    one = scene(placement="sglang")
    one.kill(1)
    one.thread.join(BOUND_S)
    assert one.error == "a scheduler of instance 1 has ended"


def test_instances_that_end_when_asked_to_are_no_failure(scene):
    one = scene()
    one.send(io.ShutdownReq())
    for index in range(2):
        assert isinstance(one.hear(one.instances[index]), io.ShutdownReq)
        one.processes[index].end(0)
    deadline = time.monotonic() + BOUND_S
    while one.controller._active_workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert one.error is None
    assert one.thread.is_alive()


def test_an_error_in_one_part_of_its_work_leaves_the_others(scene, monkeypatch):
    one = scene()
    for whose, name in (
        (one.controller.drains, "step"),
        (one.controller.coordinator, "forget_old"),
        (one.controller.prefixes, "forget"),
    ):
        monkeypatch.setattr(whose, name, lambda *_: 1 // 0)
    monkeypatch.setattr(type(one.controller.drains), "__bool__", lambda _: True)
    one.send(request("a", routed_dp_rank=1))
    one.hear(one.instances[1])
    one.kill(1)
    assert aborted(one, 1) == ["a"]
    assert one.controller.describe()["states"] == ["live", "dead"]
    kinds = {"drains", "the end of an instance", "lost messages"}
    assert one.controller.errors.counts.keys() == kinds
