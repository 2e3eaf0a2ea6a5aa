"""The controller with many instances, over TCP: `python -m evals.bench.controller_scale`.

The controller is ours, whole, in a process of its own: its loop and sockets, and SGLang's dispatch.
The instances only exist as sockets and figures, many in one process, each with control sockets and
keys of its own. In every pass an instance takes in what has come, says how it is, and ends requests
that have run long enough. Requests come at a constant rate from a process in the place of SGLang's
tokenizer manager.

Prints messages that the controller heard and requests that it placed, per second; microseconds of a
placement, with all messages that it took in before it decided, and the processor's time of that,
which other processes do not lengthen; microseconds of the decision alone; bytes and
packets per second over the loopback device, with all headers; and the processor's time of the
controller's Python thread, and of its others, which decrypt, in per cent of one core.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import resource
import secrets
import statistics
import tempfile
import threading
import time
import warnings
from array import array
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from types import SimpleNamespace
from typing import Any

import psutil
import zmq

from pascal_sglang.cluster import control_keys
from pascal_sglang.cluster.control_channel import CONTROLLER, ControlReceiver, ControlSender
from pascal_sglang.cluster.messages import (
    LoadReport,
    MigrateCommand,
    MigrationEnded,
    ReasoningEnded,
    RequestFinished,
)
from pascal_sglang.cluster.prefix_index import block_names
from pascal_sglang.config import CONFIG_ENV, PascalConfig

KV_TOKENS = 400_000
PROMPT_TOKENS = 256
# Seconds that a request thinks, and then answers.
THINKS_S, ANSWERS_S = 1.5, 1.5
# Seconds for everybody to find each other, and then until the load is steady.
JOIN_S, WARM_S = 180.0, 4.0
MAX_SOCKETS = 1 << 14


def prompt(number: int) -> array[int]:
    """A thousand system prompts, each with many questions."""
    dice = random.Random(number)
    half = PROMPT_TOKENS // 2
    return array("q", [dice.randrange(1000)] * half + [number + 1000] * half)


class Instance:
    """The sockets of one instance, and the requests that it pretends to run."""

    def __init__(self, place: str, index: int, instances: int, folder: str, moves: bool) -> None:
        self.index, self.moves = index, moves
        self.receiver = ControlReceiver(place, index, instances)
        self.sender = ControlSender(place, index)
        self.requests: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.requests.setsockopt(zmq.LINGER, 0)
        self.requests.connect(f"ipc://{folder}/{index}")
        self.received = 0
        self.thinking: deque[tuple[float, int]] = deque()
        self.answering: deque[tuple[float, int]] = deque()
        self.dice = random.Random(index)

    def take_in(self, now: float) -> None:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, sock_recv

        for data in self.receiver.receive():
            read = self.receiver.read(data)
            if read is not None and isinstance(read[1], MigrateCommand):
                ended = MigrationEnded(read[1].target, read[1].migration, True, "")
                self.sender.send(CONTROLLER, ended)
        while True:
            try:
                came = sock_recv(self.requests, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            if isinstance(came, TokenizedGenerateReqInput):
                self.received += 1
                self.thinking.append((now + THINKS_S, int(str(came.rid))))

    def step(self, now: float) -> None:
        """A pass."""
        self.take_in(now)
        while self.thinking and self.thinking[0][0] <= now:
            _, number = self.thinking.popleft()
            self.answering.append((now + ANSWERS_S, number))
            if self.moves:
                said = ReasoningEnded(self.index, str(number), 3000, 2000, 600, 10)
                self.sender.send(CONTROLLER, said)
        while self.answering and self.answering[0][0] <= now:
            _, number = self.answering.popleft()
            blocks = list(block_names(prompt(number)))
            self.sender.send(CONTROLLER, RequestFinished(self.index, str(number), blocks))
        self.sender.send(CONTROLLER, self.report())

    def report(self) -> LoadReport:
        live = len(self.thinking) + len(self.answering)
        free = self.dice.randrange(KV_TOKENS // 4)
        return LoadReport(
            dp_rank=self.index,
            received=self.received,
            on_pace=self.dice.random() < 0.9,
            footprint=KV_TOKENS - free,
            reasoning=len(self.thinking),
            fresh=len(self.answering),
            free=free,
            fits=self.dice.randrange(200),
            waiting=self.dice.randrange(1000),
            capacity=KV_TOKENS,
            load=live,
            batch=live,
            pass_us=self.dice.randrange(20_000, 60_000),
            prefill_ns=80_000,
        )


def run_instances(
    place: str, mine: range, instances: int, folder: str, moves: bool, pass_s: float, over: Event
) -> None:
    """A process with some of the instances; each takes a pass every `pass_s` seconds."""
    _prepare()
    made = [Instance(place, index, instances, folder, moves) for index in mine]
    turns = deque((time.perf_counter() + pass_s * n / len(made), i) for n, i in enumerate(made))
    while not over.is_set():
        at, instance = turns.popleft()
        if (wait := at - time.perf_counter()) > 0:
            time.sleep(wait)
        now = time.perf_counter()
        instance.step(now)
        # A process that cannot keep up takes longer passes; it does not catch up.
        turns.append((max(at, now - pass_s) + pass_s, instance))


def run_controller(
    instances: int, folder: str, listen: str | None, moves: bool, pipe: Connection
) -> None:
    """The controller's process. It says its place, and then figures when it is asked."""
    _prepare()
    from sglang.srt.managers import data_parallel_controller as stock
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.watchdog import Watchdog

    from pascal_sglang.cluster import controller as ours
    from pascal_sglang.cluster import watched_controller

    config = PascalConfig(policy="paper" if moves else "pascal", control_listen=listen)
    os.environ[CONFIG_ENV] = config.to_json()
    zmq.Context.instance().set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    placed: list[float] = []
    worked: list[float] = []
    decided: list[float] = []
    heard = 0

    def launch(controller: Any, _: Any) -> None:
        """In the place of SGLang's constructor: what it leaves behind, without processes."""
        context = controller.context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        controller.port_args = SimpleNamespace(tokenizer_ipc_name=f"ipc://{folder}/manager")
        controller.recv_from_tokenizer = context.socket(zmq.PULL)
        controller.recv_from_tokenizer.bind(f"ipc://{folder}/requests")
        controller.workers = [context.socket(zmq.PUSH) for _ in range(instances)]
        for index, worker in enumerate(controller.workers):
            worker.setsockopt(zmq.SNDHWM, 0)
            worker.bind(f"ipc://{folder}/{index}")
        controller.server_args = SimpleNamespace(served_model_name="m")
        controller.status, controller.dp_active = [True] * instances, [True] * instances
        controller._active_workers = list(range(instances))
        controller.control_message_step = 1
        controller.load_balance_method = stock.LoadBalanceMethod.ROUND_ROBIN
        controller.refresh_load_budget_on_dispatch = False
        controller.scheduler_procs = []
        controller.soft_watchdog = Watchdog.create("bench", None)
        controller.dispatching = controller.round_robin_scheduler
        controller.round_robin_counter = 0
        controller.init_dispatcher()

    class Controller(ours.PascalController):
        def place(self, req: Any) -> None:
            began, busy = time.perf_counter(), time.thread_time()
            super().place(req)
            worked.append((time.thread_time() - busy) * 1e6)
            placed.append((time.perf_counter() - began) * 1e6)

        def _hear(self, message: Any, now: float) -> None:
            nonlocal heard
            heard += 1
            super()._hear(message, now)

    stock.DataParallelController.__init__ = launch
    vars(ours)["get_observability"] = lambda: SimpleNamespace(enable_metrics=False)
    vars(watched_controller)["step_together"] = lambda: False
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = ["--model-path", "m", "--dp-size", str(instances)]
    controller = Controller(parser.parse_args(flags))
    choose = controller.placement.place

    def timed(*args: Any) -> int:
        began = time.perf_counter()
        chosen: int = choose(*args)
        decided.append((time.perf_counter() - began) * 1e6)
        return chosen

    vars(controller.placement)["place"] = timed
    pipe.send(controller.control_receiver.place)
    thread = threading.Thread(target=controller.event_loop, daemon=True)
    thread.start()
    while (asked := _told(pipe)) != "end":
        if asked == "begin":
            placed.clear()
            worked.clear()
            decided.clear()
            heard = 0
        pipe.send(
            {
                "known": sum(at is not None for at in controller.load_tracker.heard),
                "placed": list(placed),
                "worked": list(worked),
                "decided": list(decided),
                "heard": heard,
                "rejected": controller.control_receiver.rejected.total(),
                "errors": dict(controller.errors.counts),
                "threads": {
                    "python": _cpu_s(thread.native_id),
                    "process": sum(psutil.Process().cpu_times()[:2]),
                },
            }
        )
    controller._folder.remove()
    os._exit(0)


def _told(pipe: Connection) -> Any:
    """What the bench asks; `end` also where it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        return "end"


def _cpu_s(thread: int | None) -> float:
    """Seconds of a processor that a thread of this process has used."""
    found = (t for t in psutil.Process().threads() if t.id == thread)
    return float(sum(t.user_time + t.system_time for t in found))


def run_requests(folder: str, rate: float, over: Event) -> None:
    """A process in the place of the tokenizer manager."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, sock_send
    from sglang.srt.sampling.sampling_params import SamplingParams

    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"ipc://{folder}/requests")
    names = TokenizedGenerateReqInput.__struct_fields__[2:13]
    began = time.perf_counter()
    number = 0
    while not over.is_set():
        if (wait := began + number / rate - time.perf_counter()) > 0:
            time.sleep(wait)
        fields: dict[str, Any] = dict.fromkeys(names)
        fields |= {"input_ids": prompt(number), "sampling_params": SamplingParams()}
        fields |= {"return_logprob": False, "logprob_start_len": 0, "top_logprobs_num": 0}
        fields |= {"stream": True}
        sock_send(socket, TokenizedGenerateReqInput(rid=str(number), **fields))
        number += 1


def measure(options: argparse.Namespace, listen: str | None, folder: str) -> dict[str, float]:
    """One row."""
    spawn = multiprocessing.get_context("spawn")
    over = spawn.Event()
    ours, theirs = spawn.Pipe()
    controller = spawn.Process(
        target=run_controller,
        args=(options.instances, folder, listen, options.moves, theirs),
        daemon=True,
    )
    controller.start()
    place = ours.recv()
    share = -(-options.instances // options.processes)
    shares = [
        range(begin, min(begin + share, options.instances))
        for begin in range(0, options.instances, share)
    ]
    others = [
        spawn.Process(
            target=run_instances,
            args=(
                *(place, mine, options.instances, folder),
                *(options.moves, options.pass_ms / 1000, over),
            ),
            daemon=True,
        )
        for mine in shares
    ]
    others.append(
        spawn.Process(target=run_requests, args=(folder, options.rate, over), daemon=True)
    )
    for process in others:
        process.start()

    def ask(what: str) -> dict[str, Any]:
        ours.send(what)
        answer: dict[str, Any] = ours.recv()
        return answer

    until = time.monotonic() + JOIN_S
    while ask("look")["known"] < options.instances:
        if time.monotonic() > until:
            raise SystemExit(f"not every instance has come: {ask('look')['known']}")
        time.sleep(0.1)
    time.sleep(WARM_S)
    before, began = ask("begin"), time.perf_counter()
    sent = psutil.net_io_counters(pernic=True)["lo"]
    time.sleep(options.seconds)
    after = ask("look")
    took = time.perf_counter() - began
    received = psutil.net_io_counters(pernic=True)["lo"]
    over.set()
    ours.send("end")
    for process in (*others, controller):
        process.join(10)
    if after["rejected"] or after["errors"]:
        raise SystemExit(f"rejected {after['rejected']}, errors {after['errors']}")
    python = after["threads"]["python"] - before["threads"]["python"]
    process_s = after["threads"]["process"] - before["threads"]["process"]
    return {
        "messages/s": after["heard"] / took,
        "requests/s": len(after["placed"]) / took,
        "place": statistics.mean(after["placed"]),
        "P50": statistics.median(after["placed"]),
        "P99": statistics.quantiles(after["placed"], n=100)[98],
        "max": max(after["placed"]),
        "CPU P50": statistics.median(after["worked"]),
        "CPU P99": statistics.quantiles(after["worked"], n=100)[98],
        "alone": statistics.mean(after["decided"]),
        "alone P99": statistics.quantiles(after["decided"], n=100)[98],
        "MB/s": (received.bytes_recv - sent.bytes_recv) / took / 1e6,
        "packets/s": (received.packets_recv - sent.packets_recv) / took,
        "python %": 100 * python / took,
        "others %": 100 * (process_s - python) / took,
    }


def _prepare() -> None:
    """A process of the bench."""
    logging.disable(logging.WARNING)  # Every socket says that it is open.
    warnings.simplefilter("ignore")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--instances", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="for them (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=500.0, help="requests per second (%(default)s)"
    )
    parser.add_argument("--pass-ms", type=float, default=40.0, help="of a pass (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a row (%(default)s)")
    parser.add_argument("--moves", action="store_true", help="policy paper: requests move")
    parser.add_argument(
        "--folder", action="store_true", help="sockets in a folder, for comparison, not TCP"
    )
    options = parser.parse_args()
    os.environ[control_keys.SECRET_ENV] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, None if options.folder else "127.0.0.1", folder)
    for name, figure in row.items():
        print(f"{name:<12}{figure:>12,.1f}", flush=True)


if __name__ == "__main__":
    main()
