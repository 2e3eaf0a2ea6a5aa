"""A Ray cluster of hosts (`tests.hosts`), and a server on them, as `launch/ray_cluster.sh` starts
both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from evals.load.server import LocalServer
from pascal_sglang.config import CONFIG_ENV
from tests.harness import BASH, STOCK, TINY_FLAGS, Server, environment
from tests.hosts import Host, Network

SCRIPT = Path(__file__).parents[1] / "launch" / "ray_cluster.sh"
# Its command line; an older release's environment has no script for it.
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PORT = 30_000
RAY_PORT = 6379
START_S, START_SERVER_S = 120, 800
# A CPU has as many GPUs as its node says.
NODE = (
    "--block --num-cpus 2 --num-gpus {gpus} --object-store-memory=80000000 "
    "--node-ip-address {address}"
)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    always = {
        "PASCAL_PYTHON": sys.executable,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "RAY_DEDUP_LOGS": "0",
        "SGLANG_PLATFORM": "pascal_cpu",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    return environment({**always, **more})


class HostServer(Server):
    """A server that `ray_cluster.sh serve` starts on a host."""

    def __init__(
        self, host: Host, model: Path, flags: Sequence[str], port: int, env: Mapping[str, str]
    ) -> None:
        """port: of this machine, which leads to the server's. env: with a configuration in it,
        SGLang's own launcher starts the server, as the script does but for `--pascal-*` flags."""
        LocalServer.__init__(self, "ray-hosts", START_SERVER_S, port)
        self.headers: dict[str, str] = {}
        self._seen = {}
        whole = ["--model-path", str(model), *TINY_FLAGS, *flags]
        launcher: Sequence[str | Path] = [*BASH, SCRIPT, "serve"]
        if CONFIG_ENV in env:
            launcher = [*STOCK, "--use-ray"]
            # What our launcher does for a CPU.
            env = {"RAY_ADDRESS": "auto", "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1", **env}
        with self.log.open("ab") as output:
            self.process: Any = host.popen(
                [*launcher, *whole, "--host", host.address, "--port", str(PORT)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(env),
            )

    def _listens(self, process: object) -> bool:
        """What listens at `port` leads to another host."""
        return True


@contextmanager
def cluster(
    network: Network, gpus: Sequence[int], env: Mapping[str, str] = {}
) -> Iterator[list[Host]]:
    """Hosts with so many GPUs each, the first of which serves."""
    hosts = [network.host() for _ in gpus]
    logs: list[Path] = []
    with ExitStack() as stack:
        for number, (host, count) in enumerate(zip(hosts, gpus, strict=True)):
            flags = NODE.format(gpus=count, address=host.address).split()
            command = ["head", "--include-dashboard=false"]
            if number:
                command = ["join", f"{hosts[0].address}:{RAY_PORT}"]
            logs.append(network.shared / f"ray-{host.name}.log")
            log = stack.enter_context(logs[-1].open("ab"))
            node = host.popen(
                [*BASH, SCRIPT, *command, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(env),
            )
            _wait_started(logs[-1], node)
        yield hosts


def _wait_started(log: Path, node: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while "Ray runtime started." not in log.read_text():
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@contextmanager
def serving(
    hosts: Sequence[Host],
    model: Path,
    flags: Sequence[str],
    env: Mapping[str, str] = {},
) -> Iterator[HostServer]:
    """A server on the first host, with one instance on each."""
    with hosts[0].forwarded(PORT) as port:
        server = HostServer(hosts[0], model, ["--dp-size", str(len(hosts)), *flags], port, env)
        try:
            with server:
                yield server
        finally:
            server.kill()
