"""The recipes in launch/: help, and command lines that the launcher takes."""

import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPES = {
    "single_gpu.sh": [],
    "eight_gpus.sh": [],
    "ray_cluster.sh": ["serve"],
}


def recipe(name, *arguments):
    """Run a recipe with `echo` for a python: what it would run comes back."""
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PASCAL_PYTHON": "echo"},
    )


@pytest.mark.parametrize("name", RECIPES)
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
