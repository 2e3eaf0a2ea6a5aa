"""SGLang's Ray backend, two instances on one host: they serve, move requests, and are ours.

Ray's GPUs are a number that its node declares, so a CPU has them too.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pascal_sglang.cluster.control_keys import SECRET_ENV
from tests.engine.load import run, settled
from tests.engine.test_failures import takes_only_its_own_along
from tests.engine.test_migration import (
    FLOOD,
    at_rest,
    controller,
    differences,
    nothing_left,
    total,
)
from tests.harness import PASCAL, TINY_FLAGS, Server, environment
from tests.ports import RAY_WORKERS, free_port
from tests.ray_hosts import RAY

COUNT = 40
TOKEN = "hf_that_nobody_reads"


@pytest.fixture(scope="module")
def folder():
    """Ray's, with its logs. Not pytest's own: Ray keeps sockets in it, whose paths must be
    short."""
    made = tempfile.mkdtemp(prefix="ray-")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder):
    """The address of a Ray node of this host's; it and all that it started are gone afterwards."""
    port = free_port()
    flags = (
        f"--head --block --node-ip-address=127.0.0.1 --port={port} --num-cpus=2 --num-gpus=2 "
        f"--min-worker-port={RAY_WORKERS[0]} --max-worker-port={RAY_WORKERS[-1]} "
        f"--include-dashboard=false --temp-dir={folder} --object-store-memory=100000000"
    )
    node = subprocess.Popen(
        [*RAY, "start", *flags.split()],
        env=environment({"RAY_USAGE_STATS_ENABLED": "0"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert node.poll() is None, "ray start ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        tree = psutil.Process(node.pid).children(recursive=True)
        node.terminate()
        for process in psutil.wait_procs([*tree, psutil.Process(node.pid)], timeout=20)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(10)


def schedulers_of(processes):
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
            if "scheduler" in " ".join(process.cmdline()).lower():
                found.append(process)
    return found


def kill_actor(server):
    """The second instance's process; Ray names it in front of every line that it logs."""
    (victim,) = set(re.findall(r"Actor pid=(\d+)\)[^\n]* DP1\]", server.output))
    os.kill(int(victim), signal.SIGKILL)
    return []


class TestTwoInstances:
    """On one server, in this order; it ends with them, for its share of the GPUs."""

    @pytest.fixture(scope="class")
    def two(self, serve, cluster):
        flags = ["--use-ray", "--dp-size", "2"]
        # The control sockets as between hosts.
        settings = {**FLOOD, "control_listen": "127.0.0.1"}
        with serve(settings, flags, RAY_ADDRESS=cluster, HF_TOKEN=TOKEN) as server:
            yield server
            server.stop(signal.SIGTERM)

    def test_they_serve_and_move(self, two, reference):
        whole, _ = run(two, COUNT)
        instances = at_rest(two)
        moved = total(instances, "outgoing", "moved")
        controller(two, moved)
        metrics = two.get("/metrics")
        assert differences(whole, reference) == []
        nothing_left(instances)
        assert [i["dp_rank"] for i in instances] == [0, 1]
        assert moved > COUNT / 3
        assert schedulers_of(two.tree()) == [], "they are Ray's processes, not the server's"
        for rank in "01":
            assert f'dp_rank="{rank}"' in metrics
        assert "pascal:migrations_total{" in metrics

    def test_the_sockets_of_a_ray_server_say_so_and_nobody_reads_their_secret(self, two, folder):
        for who in ("the controller process", "instance 0", "instance 1"):
            assert re.search(rf"messages to {who} come in over TCP at 127\.0\.0\.1:\d+", two.output)
        addresses = two.get("/pascal/status")["controller"]["control_addresses"]
        assert sorted(addresses) == ["0", "1", "controller"]
        logs = []
        for path in Path(folder).rglob("*"):
            with suppress(FileNotFoundError):  # Ray rotates its logs.
                logs += [path.read_bytes()] if path.is_file() else []
        lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        assert any(b"PASCAL_SGLANG_CONTROL" in log for log in logs), "this shows nothing"
        for secret in (SECRET_ENV, TOKEN):
            said = (*logs, *map(str.encode, lines))
            assert not [log for log in said if secret.encode() in log]

    def test_an_actor_that_dies_takes_only_its_own_requests_along(self, two):
        takes_only_its_own_along(two, 1, kill_actor)
        assert "a scheduler of instance 1 ended with ActorDiedError" in two.output


def test_one_instance_serves(serve, reference, cluster):
    with serve({}, ["--use-ray"], RAY_ADDRESS=cluster) as server:
        whole, _ = run(server, COUNT // 2)
        instance = settled(server)
        server.stop(signal.SIGTERM)
    assert differences(whole, reference) == []
    assert instance["policy"] == "pascal"


def test_too_few_gpus_are_refused_not_waited_for(tiny_model, cluster):
    """SGLang would wait for the third one without end."""
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--use-ray", "--dp-size", "3"]
    server = Server(PASCAL, flags, {"RAY_ADDRESS": cluster}, warm=True)
    try:
        assert server.process.wait(120) == 2
    finally:
        server.kill()
    last = server.output.strip().splitlines()[-1]
    assert last.startswith("pascal_sglang: error: cannot serve ")
    assert "--use-ray needs 3 GPUs and Ray has 2;" in last
