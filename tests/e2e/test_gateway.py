"""Two servers behind SGLang's model gateway: its own process, as `launch/gateway.sh` starts it.

With `TEST_HOSTS=4` two servers are also on hosts of their own (`tests.hosts`), where they are
restarted, killed and switched off.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import chat_load, hosts, ports
from tests.harness import BASH, PASCAL, STOP_TIMEOUT_S, TINY_FLAGS, Server, environment, fork
from tests.requests import generate

pytest.importorskip("sglang_router", reason="no gateway: the extra `gateway` is not installed")

ROOT = Path(__file__).parents[2]
RECIPE = (*BASH, str(ROOT / "launch" / "gateway.sh"))
LOAD = str(ROOT / "tests" / "chat_load.py")
# Until something happens that has to happen.
LONG_S = 120


def wait_until(holds, what):
    deadline = time.monotonic() + LONG_S
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


class Gateway:
    """prefix: runs its commands where they belong."""

    def __init__(self, urls, log, *flags, prefix=(), address="127.0.0.1"):
        port = ports.free_port()
        self.url = f"http://{address}:{port}"
        self._prefix = prefix
        where = ["--host", address, "--port", str(port)]
        metrics = ["--prometheus-port", str(ports.free_port())]
        self._output = log.open("w")
        self.log = log
        self.process = subprocess.Popen(
            [*prefix, *RECIPE, "serve", *urls, *where, *metrics, *flags],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment({"PASCAL_PYTHON": sys.executable}),
        )

    def __enter__(self):
        try:
            wait_until(lambda: len(self.healthy()) == 2, "the gateway does not see two servers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        self._output.close()

    def get(self, path):
        """What it answers; None if it does not."""
        if not self._prefix:
            try:
                with urllib.request.urlopen(self.url + path, timeout=10) as reply:
                    return json.load(reply)
            except OSError:
                return None
        asked = [*self._prefix, "curl", "--silent", "--max-time", "10", self.url + path]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
        return json.loads(said) if said else None

    def healthy(self):
        """The servers that it sends requests to."""
        workers = (self.get("/workers") or {}).get("workers", [])
        return sorted(w["url"] for w in workers if w["is_healthy"])


class Load:
    """`tests/chat_load.py`, whose replies are collected in `replies`."""

    def __init__(self, url, threads=8, prefix=()):
        self._process = subprocess.Popen(
            [*prefix, sys.executable, LOAD, url, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.replies = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.replies.append(json.loads(line))

    def more(self, count):
        """Wait for this many further replies."""
        enough = len(self.replies) + count
        wait_until(lambda: len(self.replies) >= enough, f"{len(self.replies)} replies")

    def end(self):
        self._process.stdin.close()
        self._process.wait(LONG_S)
        self._reader.join()
        return self.replies


def check_complete(replies, count):
    """Each of at least so many came whole, in any of the forms."""
    assert [reply for reply in replies if reply["error"]] == []
    forms = Counter((r["stream"], r["thinks"], r["finish"], r["tokens"]) for r in replies)
    assert {(*form[:2], "length", chat_load.TOKENS) for form in forms} == set(forms), forms
    assert len(forms) == 4
    assert len(replies) >= count
    numbers = sorted(reply["number"] for reply in replies)
    assert numbers == list(range(len(replies)))


def check_same(replies, ask, count=12):
    """Some of them again from a server itself: no token was lost, repeated or changed."""
    for reply in replies[:: max(1, len(replies) // count)]:
        assert ask(reply["number"], reply["stream"], reply["thinks"])["text"] == reply["text"]


def served(server):
    """Requests that have ended on a server."""
    return sum(sum(i["ended"].values()) for i in server.instances())


@pytest.fixture(scope="module")
def other_server(tiny_model):
    """Beside `pascal_server`. It has little KV: what is too much is paused."""
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--max-total-tokens", "512"]
    with Server(PASCAL, [*flags, *ports.not_drawn()], warm=True) as server:
        yield server


def test_a_drained_server_leaves_the_gateway_and_no_request_fails(
    pascal_server, other_server, tmp_path
):
    from openai import OpenAI

    servers = pascal_server, other_server
    urls = sorted(server.base_url for server in servers)
    with Gateway(urls, tmp_path / "gateway.log") as gateway:
        load = Load(gateway.url)
        try:
            before = [served(server) for server in servers]
            load.more(20)
            assert all(map(int.__gt__, map(served, servers), before)), "one served none"
            run = [*RECIPE, "drain", other_server.base_url, "1"]
            said = subprocess.run(run, capture_output=True, text=True, timeout=LONG_S, check=True)
            assert '"state":"drained"' in said.stdout.splitlines()[-1]
            only = [pascal_server.base_url]
            wait_until(lambda: gateway.healthy() == only, "the gateway does not see the drain")
            rest = served(other_server)
            load.more(20)
            assert served(other_server) == rest
            assert other_server.get("/pascal/status")["drain"]["left"] == 0
            assert refusal(other_server) == (503, "1")
            assert "pascal:refused_requests_total{model_name" in other_server.get("/metrics")
            run = [*RECIPE, "undrain", other_server.base_url]
            subprocess.run(run, capture_output=True, text=True, timeout=LONG_S, check=True)
            wait_until(lambda: gateway.healthy() == urls, "it does not come back")
            load.more(20)
            wait_until(lambda: served(other_server) > rest, "it serves none")
        finally:
            replies = load.end()
    check_complete(replies, 60)
    client = OpenAI(base_url=f"{pascal_server.base_url}/v1", api_key="none", timeout=120)
    check_same(replies, lambda *asked: chat_load.ask(client, *asked))


def refusal(server):
    """Status and `Retry-After` of a new request."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/generate", generate("Hm", think=2, total=3))
    return refused.value.code, refused.value.headers["Retry-After"]


def test_the_gateway_reads_loads_with_paused_requests(pascal_server, other_server, tmp_path):
    """More than the KV of one server, whose requests it pauses into host memory."""
    urls = [pascal_server.base_url, other_server.base_url]
    flags = ["--policy", "power_of_two"]
    with Gateway(urls, tmp_path / "gateway.log", *flags) as gateway, ThreadPoolExecutor(12) as pool:
        bodies = [generate(f"Load {i}", think=75, total=100) for i in range(48)]
        jobs = [pool.submit(other_server.post, "/generate", body) for body in bodies]
        seen = []
        while not all(job.done() for job in jobs):
            loads = other_server.get("/get_load")
            paused = other_server.instances()[0]["paused"]
            read = {w["worker"]: w["load"] for w in gateway.get("/get_loads")["workers"]}
            seen.append((loads, paused, read))
        assert all(len(job.result()["output_ids"]) == 100 for job in jobs)
        prompt = max(job.result()["meta_info"]["prompt_tokens"] for job in jobs)
        # The device has KV for 512 tokens; beside it, prompts wait.
        most = max(loads[0]["num_tokens"] for loads, _, _ in seen)
        assert most > 512 + 12 * prompt, "what is in host memory counts too"
        assert any(paused for _, paused, _ in seen)
        assert max(loads[0]["num_waiting_reqs"] for loads, _, _ in seen) > 0
        assert max(read[other_server.base_url] for _, _, read in seen) > 512 + 12 * prompt
        # A token of a health check.
        assert max(read[pascal_server.base_url] for _, _, read in seen) < 10


class HostServer:
    """A server on a host of its own, as a fork of a process there."""

    def __init__(self, host, model, folder):
        self.host, self._model, self._folder = host, model, folder
        self._starts = 0
        self.base_url = f"http://{host.address}:30000"
        self._warm = str(folder / f"{host.name}.socket")
        warm = host.popen(
            [sys.executable, ROOT / "tests" / "warm_servers.py", self._warm, "keep"],
            stdout=subprocess.PIPE,
            env=environment({"SGLANG_PLATFORM": "pascal_cpu"}),
        )
        assert warm.stdout.readline() == b"ready\n"

    def start(self):
        if self._starts and self.process.poll() is None:
            return
        self._starts += 1
        self.log = self._folder / f"{self.host.name}-{self._starts}.log"
        self.log.touch()
        flags = ["--model-path", str(self._model), *TINY_FLAGS, "--host", self.host.address]
        command = [*PASCAL, *flags, "--port", "30000"]
        self.process = fork(command, environment(), ROOT, self.log, self._warm)

    def terminate(self):
        """Ask it to end, and wait until it has."""
        self.host.run(["kill", "-TERM", str(self.process.pid)])
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self):
        """All its processes, at once."""
        self.host.run(["kill", "-KILL", "--", f"-{self.process.pid}"])

    def ready(self):
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        asked = [*self.host.prefix, "curl", "--silent", "--fail", f"{self.base_url}/health"]
        return subprocess.run(asked, capture_output=True, timeout=60, check=False).returncode == 0

    def instances(self):
        return json.loads(self.host.run(["curl", "--silent", f"{self.base_url}/pascal/status"]))[
            "instances"
        ]


@pytest.fixture(scope="module")
def far():
    """Two servers and a third host, for the gateway and its clients."""
    if "TEST_HOSTS" not in os.environ:
        pytest.skip("takes minutes; TEST_HOSTS=4")
    from pascal_sglang.demo.tiny import build_tiny_model

    with hosts.network() as network:
        model = build_tiny_model(network.shared / "model")
        servers = [HostServer(network.host(), model, network.shared) for _ in range(2)]
        yield servers, network.host()


@pytest.fixture
def gateway_of(far, tmp_path):
    """A gateway on the third host, once both servers serve."""
    servers, front = far
    with ThreadPoolExecutor() as pool:  # Each imports SGLang first.
        list(pool.map(HostServer.start, servers))
    for server in servers:
        wait_until(server.ready, f"{server.host.name} does not start")
    urls = [server.base_url for server in servers]
    log = tmp_path / "gateway.log"
    with Gateway(urls, log, prefix=front.prefix, address=front.address) as gateway:
        yield gateway
    front.run(["pkill", "-f", "sglang::router"])


def test_two_servers_on_hosts_are_restarted_in_turn_under_200_requests(far, gateway_of):
    (first, second), front = far
    load = Load(gateway_of.url, prefix=front.prefix)
    try:
        load.more(60)
        before = served(first), served(second)
        said = front.run([*RECIPE, "drain", second.base_url], timeout=LONG_S)
        assert '"state":"drained"' in said.splitlines()[-1]
        assert second.terminate() == 0
        load.more(30)
        second.start()
        urls = [first.base_url, second.base_url]
        wait_until(lambda: gateway_of.healthy() == urls, "it does not come back")
        load.more(40)
        assert served(second) > 0
        # The other one, without a drain before.
        assert first.terminate() == 0
        load.more(30)
    finally:
        replies = load.end()
    assert min(before) > 0, "one served none"
    check_complete(replies, 200)

    def ask(*asked):
        code = (
            "import json, sys; from openai import OpenAI; from tests import chat_load; "
            "client = OpenAI(base_url=sys.argv[1], api_key='none', timeout=120); "
            "print(json.dumps(chat_load.ask(client, *json.loads(sys.argv[2]))))"
        )
        where = f"{second.base_url}/v1", json.dumps(asked)
        return json.loads(front.run([sys.executable, "-c", code, *where], cwd=ROOT))

    check_same(replies, ask, 4)


def check_only_streams_failed(replies):
    """No more of them than were under way at one time; the others are whole."""
    failed = [reply for reply in replies if reply["error"]]
    assert all(reply["stream"] and reply["text"] for reply in failed), failed
    assert len(failed) <= 16
    whole = [reply for reply in replies if not reply["error"]]
    assert {(r["finish"], r["tokens"]) for r in whole} == {("length", chat_load.TOKENS)}


@pytest.mark.parametrize(("lost", "further"), [("server", 16), ("host", 64)])
def test_of_a_server_that_is_killed_the_streams_break_off_and_the_rest_is_tried_again(
    far, gateway_of, lost, further
):
    """Or whose host is switched off, the last thing that happens to `far`: nothing closes the
    connections to it."""
    (first, second), front = far
    load = Load(gateway_of.url, threads=16, prefix=front.prefix)
    try:
        load.more(32)
        (second if lost == "server" else second.host).kill()
        only = [first.base_url]
        wait_until(lambda: gateway_of.healthy() == only, "the gateway does not miss it")
        load.more(further)
    finally:
        replies = load.end()
    check_only_streams_failed(replies)
