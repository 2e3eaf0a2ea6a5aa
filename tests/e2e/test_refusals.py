"""What cannot be served is refused with one clear line, and nothing stays behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.seams import installed
from tests.engine.inproc.models import FLAGS, build
from tests.harness import PASCAL, STOCK, TINY_FLAGS, environment, fork
from tests.ports import not_drawn

ROOT = Path(__file__).parents[2]
SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
ENGINE = "import sys, sglang; sglang.Engine(model_path=sys.argv[2], device='cpu')\n"
ASKED = {CONFIG_ENV: PascalConfig().to_json(), "SGLANG_PLATFORM": "pascal_cpu"}
SYMBOL = "sglang.srt.managers.scheduler:Scheduler._create_generation_req"


def run(command, flags, env=None):
    """Run to the end; (exit code, output). Fails if a child outlives the command."""
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(env),
        cwd=tempfile.gettempdir(),  # Not the checkout: `python -m` would prefer what lies there.
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        nothing_left(process.pid)
    return process.returncode, output


@pytest.fixture
def forked(tmp_path):
    """As `run`, by a fork with SGLang's imports done. folder: whose package of ours it imports."""

    def run_forked(flags, command=PASCAL, env=None, folder=ROOT):
        log = tmp_path / "log"
        log.touch()
        process = fork([*command, *flags], environment(env), folder, log)
        try:
            code = process.wait(180)
        finally:
            nothing_left(process.pid)
        return code, log.read_text()

    return run_forked


def nothing_left(session):
    """Fails if a process of that session still lives; it does not afterwards."""
    left = [
        p
        for p in psutil.process_iter()
        if _session(p) == session and p.status() != psutil.STATUS_ZOMBIE
    ]
    # Its children may take a moment to follow it.
    _, left = psutil.wait_procs(left, timeout=60)
    for p in left:
        p.kill()
    assert left == []


def _session(process):
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def our_lines(output):
    return [line for line in output.splitlines() if line.startswith("pascal_sglang")]


@pytest.fixture(scope="module")
def altered_copy(tmp_path_factory):
    """A copy of the package whose seam list expects something else of one symbol."""
    copy = tmp_path_factory.mktemp("altered")
    shutil.copytree(ROOT / "pascal_sglang", copy / "pascal_sglang")
    shutil.copytree(ROOT / "patches", copy / "patches")
    seams = copy / "patches" / "seams.toml"
    before, symbol, after = seams.read_text().partition(f'"{SYMBOL}"')
    assert symbol
    head, quote, tail = after.partition(f'"{installed().version}" = "')
    seams.write_text(before + symbol + head + quote + "f" * 16 + tail[16:])
    return copy


def is_refused(code, output):
    assert code != 0
    (line,) = our_lines(output)
    assert SYMBOL in line
    assert "refuses to serve" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("command", [PASCAL, STOCK, SERVE])
def test_an_altered_seam_stops_every_entry_point(altered_copy, tiny_model, forked, command):
    is_refused(*forked(["--model-path", str(tiny_model)], command, ASKED, altered_copy))


def test_an_altered_seam_stops_a_program_of_ones_own(altered_copy, tiny_model, forked, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ENGINE)
    flags = ["--model-path", str(tiny_model)]
    is_refused(*forked(flags, (sys.executable, str(program)), ASKED, altered_copy))


WITHOUT_PLUGIN = """
import multiprocessing, os, sys
from sglang.srt.entrypoints.engine import Engine
from pascal_sglang import launch_server

launch = Engine._launch_scheduler_processes.__func__
start_by = multiprocessing.context._default_context.set_start_method

def without(cls, *args, **kwargs):
    os.environ["SGLANG_PLUGINS"] = "nothing"
    start_by("spawn", force=True)  # A fork would have the plugin already.
    try:
        return launch(cls, *args, **kwargs)
    finally:
        start_by("fork", force=True)

Engine._launch_scheduler_processes = classmethod(without)
if __name__ == "__main__":
    sys.exit(launch_server.main(sys.argv[1:]))
"""


def test_a_process_without_the_plugin_is_refused(tiny_model, forked, tmp_path):
    """The launcher's own process is fine, but a whitelist keeps the plugin out of its schedulers,
    which import everything themselves."""
    script = tmp_path / "whitelist.py"
    script.write_text(WITHOUT_PLUGIN)
    env = {"SGLANG_PLATFORM": "pascal_cpu"}
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, *not_drawn()]
    code, output = forked(flags, (sys.executable, str(script)), env)
    assert code == 2
    assert any("runs without the plugin" in line for line in our_lines(output))


def broken_model(tmp_path):
    (tmp_path / "config.json").write_text("{ not json")
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--pascal-require", "recompute", "--pp-size", "2"], "--pp-size above 1"),
        (["--pascal-require", "move"], "the level here is pause, because of one instance"),
        (["--pascal-pace-stream", "--tokenizer-worker-num", "2"], "--tokenizer-worker-num"),
    ],
)
def test_what_would_not_work_here_ends_in_one_line(forked, tiny_model, asked, says):
    flags = ["--model-path", str(tiny_model), "--device", "cpu", *asked]
    code, output = forked(flags)
    assert code == 2
    (line,) = our_lines(output)
    assert says in line


@pytest.fixture(scope="module")
def windows_alone(tmp_path_factory):
    """A model without a layer of full attention. Arguments do not tell which pool that takes."""
    folder = build("gpt_oss", tmp_path_factory.mktemp("windows") / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    path.write_text(json.dumps(config))
    return folder


def test_a_model_whose_pool_alone_gets_less_ends_in_one_line(forked, windows_alone):
    asked = ["--dp-size", "2", "--pascal-migration", "adaptive", "--pascal-require", "move"]
    flags = ["--model-path", str(windows_alone), *TINY_FLAGS, *FLAGS["gpt_oss"], *asked]
    code, output = forked(flags, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    assert code == 2
    assert "level move by the arguments" in output
    (line,) = [line for line in our_lines(output) if "error" in line]
    assert "--pascal-require move: the level here is order, because of a pool of sliding" in line
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model-path", "/no/such/model"], "does not exist"),
        (["--model-path", tempfile.gettempdir()], "config.json"),
        (["--model-path", ".", "--no-such-flag"], "--no-such-flag"),
        ([], "--model-path"),
        (["--demo", "--model-path", "x"], "--demo"),
    ],
)
def test_bad_flags_end_in_one_line(forked, flags, says):
    code, output = forked([*flags, "--device", "cpu"])
    assert code == 2
    assert output.count("\n") == 1, output
    assert says in output


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--model-path", "x", "--port", "many"], "--port"), (["--pascal-policy", "best"], "best")],
)
def test_bad_flags_do_from_a_shell(flags, says):
    """Before SGLang is imported, and after it."""
    code, output = run(PASCAL, [*flags, "--device", "cpu"])
    assert code == 2
    assert output.count("\n") == 1, output
    assert says in output


def test_an_unreadable_model_config_ends_in_one_line(forked, tmp_path):
    flags = ["--model-path", str(broken_model(tmp_path)), "--device", "cpu"]
    code, output = forked(flags)
    assert code == 2
    assert output.count("\n") == 1, output
    assert "config.json" in output


def test_a_model_nobody_knows_ends_in_one_line(forked):
    flags = ["--model-path", "nobody/knows-this-model", "--device", "cpu"]
    code, output = forked(flags)
    assert code == 2
    assert "nobody/knows-this-model" in our_lines(output)[-1]
    assert "Traceback" not in output


def test_a_busy_port_ends_in_one_line(forked, tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ["--model-path", str(tiny_model), "--device", "cpu", "--port", port]
        code, output = forked(flags)
    assert code == 2
    assert f"port {port}" in our_lines(output)[-1]
    assert "Traceback" not in output


def test_an_unwritable_cache_ends_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, output = run(PASCAL, ["--demo"], {"PASCAL_SGLANG_CACHE": str(blocked / "cache")})
    assert code == 2
    assert output.count("\n") == 1, output
    assert str(blocked) in output


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        (
            PascalConfig(require="move"),
            [],
            "--pascal-require move: the level here is pause, because of one instance",
        ),
        (
            PascalConfig(pace_stream=True),
            ["--tokenizer-worker-num", "2"],
            "does not work with --tokenizer-worker-num above 1",
        ),
    ],
)
def test_sglangs_own_entry_point_refuses_the_same(tiny_model, forked, config, flags, says):
    """No launcher of ours is there to say it early; the server must not start all the same."""
    env = {**ASKED, CONFIG_ENV: config.to_json()}
    code, output = forked(["--model-path", str(tiny_model), *TINY_FLAGS, *flags], SERVE, env)
    assert code != 0
    assert says in output
