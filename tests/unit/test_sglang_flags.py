"""A mistake on the launcher's command line is answered before SGLang is imported, and nothing that
SGLang accepts is a mistake."""

import argparse
import json
import socket
import subprocess
import sys

import pytest

from pascal_sglang.config import LaunchError
from pascal_sglang.entrypoints import sglang_flags
from pascal_sglang.entrypoints.preflight import check_given

OURS = ("--demo", "--pascal-policy")


@pytest.fixture(scope="module")
def parser():
    """SGLang's own."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    return parser


def test_the_flags_read_from_the_source_are_those_of_the_parser(parser):
    flags = {option: a.dest for a in parser._actions for option in a.option_strings}
    read = sglang_flags.known()
    assert read.fields == flags
    assert {n: read.defaults[n] for n in ("host", "port")} == {
        n: parser.get_default(n) for n in ("host", "port")
    }


def test_no_beginning_of_a_flag_is_a_typo(parser):
    for option in list(sglang_flags.known().fields)[::20]:
        for end in range(3, len(option) + 1):
            assert sglang_flags.typo([option[:end], "1"], OURS) is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--model-path", "x", "--json-model-override-args", "--a value of two words"],
        ["--port=1", "-h", "--", "--nothing-like-it"],
        # Of a plugin that SGLang brings along.
        ["--servicer-impl", "rust", "--metrics-ho", "x"],
    ],
)
def test_what_sglang_takes_is_no_typo(argv):
    assert sglang_flags.typo(argv, OURS) is None


@pytest.mark.parametrize(
    ("argv", "close"),
    [
        (["--mdoel-path", "x"], "--model-path"),
        (["--model-path", "x", "--tp-szie=2"], "--tp-size"),
        (["--pascl-policy", "rr"], "--pascal-policy"),
        (["--model-path", "--demos"], "--demo"),
    ],
)
def test_a_typo_is_named_with_what_was_meant(argv, close):
    assert str(sglang_flags.typo(argv, OURS)).endswith(f"; did you mean {close}?")


def test_a_flag_like_nothing_else_is_named_alone():
    assert sglang_flags.typo(["--qqqqqq"], OURS) == "unknown flag --qqqqqq"


def test_flags_of_a_plugin_that_nobody_knows_are_left_to_sglang(monkeypatch):
    entry = sglang_flags.importlib.metadata.EntryPoint("other", "other:register", "x")
    monkeypatch.setattr(sglang_flags.importlib.metadata, "entry_points", lambda **_: [entry])
    assert sglang_flags.typo(["--mdoel-path"], OURS) is None


def test_the_last_value_of_a_flag_counts_under_any_of_its_names():
    argv = ["--model", "a", "--tensor-parallel-s", "2", "--model-path=b", "--port"]
    assert sglang_flags.values(argv) == {"model_path": "b", "tp_size": "2", "port": None}
    # As ambiguous as SGLang finds it.
    assert sglang_flags.values(["--mode", "x"]) == {}


def test_a_port_that_is_busy_or_none():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for argv in (["--port", port], ["--por=" + port]):
            with pytest.raises(LaunchError, match=f"port {port} on 127.0.0.1 is already in use"):
                check_given(argv, has_model=True)
        # What a file says is not known yet, and what is no number is SGLang's to refuse.
        check_given(["--port", port, "--config", "x.yaml"], has_model=False)
        check_given(["--port", "many"], has_model=True)
    with pytest.raises(LaunchError, match="not between 0 and 65535"):
        check_given(["--port", "99999"], has_model=True)


def test_the_launcher_answers_without_importing_sglang():
    """All in one process that has not imported it."""
    asked = {
        "version": ["--version"],
        "typo": ["--mdoel-path", "x"],
        "our typo": ["--demo", "--pascal-polcy", "rr"],
        "no model": [],
        "gone": ["--model-path", "/no/such/model"],
    }
    code = (
        "import contextlib, io, json, sys\n"
        "from pascal_sglang import launch_server\n"
        "def ask(argv):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "        try: code = launch_server.main(argv)\n"
        "        except SystemExit as end: code = end.code\n"
        "    return code, out.getvalue()\n"
        "said = {name: ask(argv) for name, argv in json.loads(sys.argv[1]).items()}\n"
        "print(json.dumps({'heavy': 'sglang' in sys.modules, **said}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True, timeout=60
    )
    said = json.loads(done.stdout)
    assert said.pop("heavy") is False
    assert said.pop("version")[0] == 0
    assert [(code, text.count("\n")) for code, text in said.values()] == [(2, 1)] * 4
    wanted = (
        "did you mean --model-path?",
        "did you mean --pascal-policy?",
        "--model-path",
        "exist",
    )
    for (_, text), words in zip(said.values(), wanted, strict=True):
        assert words in text
