"""The recipes in launch/: help, and command lines that the launcher takes."""

import argparse
import json
import shlex
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPES = {
    "single_gpu.sh": [],
    "eight_gpus.sh": [],
    "ray_cluster.sh": ["serve"],
}


def recipe(name, *arguments, **environment):
    """Run a recipe with `echo` for a python: what it would run comes back."""
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "PASCAL_PYTHON": "echo",
            **environment,
        },
    )


@pytest.mark.parametrize("name", [*RECIPES, "gateway.sh"])
def test_help_is_the_head_of_the_script(name):
    done = recipe(name, "--help")
    assert done.returncode == 0
    assert f"bash launch/{name}" in done.stdout
    assert "set -euo" not in done.stdout
    assert done.stdout.strip().endswith(".")


@pytest.mark.parametrize(
    "script", ["launch/quickstart.sh", "evals/gpu/check.sh", "evals/gpu/kit.sh", "tests/run.sh"]
)
def test_other_scripts_have_help_that_installs_nothing(script):
    done = subprocess.run(
        ["bash", str(ROOT / script), "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash {script}" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_sglang_and_we_know_every_flag(name):
    from sglang.srt.server_args import ServerArgs

    from pascal_sglang.entrypoints.preflight import OneLineParser
    from pascal_sglang.launch_server import parse

    done = recipe(name, *RECIPES[name], "--pascal-policy", "paper", "--port", "1234")
    assert done.returncode == 0, done.stderr
    module, *flags = shlex.split(done.stdout)[1:]
    assert module == "pascal_sglang.launch_server"
    options, rest = parse(flags)
    assert options.pascal_policy == "paper"
    parser = OneLineParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(rest)
    assert parsed.port == 1234, "what is given wins over the recipe's own"
    assert parsed.enable_metrics


def test_the_paper_had_eight_instances():
    assert "--dp-size 8" in recipe("eight_gpus.sh").stdout


def test_a_ray_cluster_is_made_node_by_node():
    assert (
        "start --head --port 6379 --num-gpus 2"
        in recipe("ray_cluster.sh", "head", "--num-gpus", "2").stdout
    )
    assert "start --address h:6379" in recipe("ray_cluster.sh", "join", "h:6379").stdout
    assert recipe("ray_cluster.sh", "join").returncode != 0
    assert recipe("ray_cluster.sh", "dance").returncode != 0


def test_the_gateway_knows_every_flag_and_those_given_win():
    router_args = pytest.importorskip("sglang_router.router_args", reason="no gateway")
    done = recipe("gateway.sh", "serve", "http://a:1", "http://b:2", "--policy", "round_robin")
    assert done.returncode == 0, done.stderr
    module, *flags = shlex.split(done.stdout)[1:]
    assert module == "sglang_router.launch_router"
    parser = argparse.ArgumentParser()
    router_args.RouterArgs.add_cli_args(parser, exclude_host_port=False)
    parsed = parser.parse_args(flags)
    assert parsed.worker_urls == ["http://a:1", "http://b:2"]
    assert (parsed.policy, parsed.host, parsed.port) == ("round_robin", "127.0.0.1", 30000)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["serve", "--port", "1"],
        ["drain"],
        ["undrain"],
        ["dance"],
        ["drain", "http://127.0.0.1:1"],
        ["undrain", "http://127.0.0.1:1"],
    ],
)
def test_a_gateway_without_servers_and_a_drain_of_nobody_end_at_once(arguments):
    assert recipe("gateway.sh", *arguments).returncode != 0


class Draining(BaseHTTPRequestHandler):
    """A server that is never drained."""

    def do_POST(self):
        said = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        self.server.asked.append((self.path, said, self.headers["Authorization"], lines))
        if len(self.server.asked) == 3:
            self.server.goes.set()
        if self.server.goes.is_set():
            return  # As one that is killed meanwhile.
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"state": "draining"}')

    def log_message(self, *_):
        """Not here."""


@pytest.fixture
def draining():
    with ThreadingHTTPServer(("127.0.0.1", 0), Draining) as server:
        server.asked, server.goes = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_drain_of_a_server_that_dies_meanwhile_ends(draining):
    done = recipe("gateway.sh", "drain", f"http://127.0.0.1:{draining.server_port}/", "7")
    assert done.returncode == 52, done.stderr  # curl: nothing came.
    assert "Empty reply from server" in done.stderr
    asked = [(path, json.loads(said), key) for path, said, key, _ in draining.asked]
    path = "/pascal/drain"
    assert asked == [(path, {"notice_s": 7}, None), (path, {}, None), (path, {}, None)]


def test_nobody_reads_the_key_of_a_drain(draining):
    key = "k" * 40
    draining.goes.set()
    url = f"http://127.0.0.1:{draining.server_port}"
    assert recipe("gateway.sh", "undrain", url, OPENAI_API_KEY=key).returncode != 0
    ((_, _, sent, lines),) = draining.asked
    assert sent == f"Bearer {key}"
    assert any("curl" in line for line in lines), "this shows nothing"
    assert not [line for line in lines if key in line]
