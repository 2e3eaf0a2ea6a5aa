"""A server that wants a key: every request of every tool has it."""

import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evals import arms, serving
from evals.gpu import identity
from evals.grading import chat
from evals.load import auth, remote
from evals.load.server import IDLE_TIMEOUT_S, Server
from evals.load.server import environment as environment_of
from tests.unit.test_quickstart import assert_gone

KEY = "s3cret"
LAUNCH = Path(__file__).parents[2] / "launch"


class Keyed(http.server.BaseHTTPRequestHandler):
    """Answers as a server of ours does that was started with the id `ours`; 401 without the key,
    except where SGLang asks for none."""

    def do_GET(self):
        if self.path in ("/health", "/metrics"):
            return self.answer(b"")
        if self.may():
            told = {"instances": [], "server_id": "ours", "data": [{"id": "m"}], "version": "1"}
            self.answer(json.dumps(told).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.may():
            return
        if self.path.startswith("/v1/"):
            return self.send_error(400)
        if self.path != "/generate":
            return self.answer(b"{}")
        asked = json.loads(body)
        total = asked["sampling_params"]["max_new_tokens"]
        meta = {"completion_tokens": total, "reasoning_tokens": 2, "finish_reason": {"type": "x"}}
        told = json.dumps({"meta_info": meta, "output_ids": [1]}).encode()
        self.answer(b"data: " + told + b"\n\n" if asked.get("stream") else told)

    def may(self):
        self.server.asked.append(self.path)
        allowed = self.headers.get("Authorization") == f"Bearer {KEY}"
        if not allowed:
            self.send_error(401)
        return allowed

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def keyed():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as server:
        server.asked = []
        server.base_url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As it was, after a test that leaves a key there."""
    monkeypatch.setenv(auth.ENV, "")


def replay(base_url, out, *more):
    return serving.main(
        ["--base-url", base_url, "--dataset-name", "tiny-live", "--num-prompts", "2",
         "--request-rate", "inf", "--no-idle-fit", "--disable-tqdm",
         "--output-file", str(out), *more]
    )  # fmt: skip


def test_serving_sends_the_key_and_does_not_write_it_down(keyed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    assert replay(keyed.base_url, out) == serving.EXIT_BAD_INPUT
    assert "HTTP 401" in capsys.readouterr().err
    assert replay(keyed.base_url, out, "--api-key", KEY) == 0
    assert {"/generate", "/server_info", "/pascal/status"} <= set(keyed.asked)
    told = json.loads(out.read_text())
    assert told["server_info"] == {"version": "1"}
    assert KEY not in out.read_text()
    monkeypatch.setenv(auth.ENV, KEY)
    assert replay(keyed.base_url, out) == 0


def test_so_do_all_others(keyed, monkeypatch):
    monkeypatch.setenv(auth.ENV, KEY)
    assert remote.instances(keyed.base_url) == []
    assert chat.first_model(keyed.base_url) == "m"
    (body,) = identity.bodies(1, "", shared=False)
    (reply,) = identity.ask(keyed.base_url, [body], 30.0)
    assert reply.ids == [1]
    server = object.__new__(Server)
    server.base_url = keyed.base_url
    server.flush()
    assert f"/flush_cache?timeout={IDLE_TIMEOUT_S}" in keyed.asked


@pytest.mark.parametrize("flags", [("--api-key", KEY), (f"--api-key={KEY}",)])
def test_an_arm_that_asks_for_a_key_gets_it(flags, monkeypatch):
    """From us, and from SGLang's benchmark, which looks for it in its environment."""
    monkeypatch.setattr(arms, "command_line", lambda *_: ["true", *flags])
    server = arms.serve(*agreement_arm())
    server.stop()
    assert auth.headers() == {"Authorization": f"Bearer {KEY}"}
    assert environment_of({})[auth.ENV] == KEY


def agreement_arm():
    plan = arms.load_plan(Path(arms.__file__).parent / "arms" / "ample.toml")
    return plan.arms[0], plan, Path("model")


def test_an_arms_server_ends_with_its_tool_however_that_ends(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from evals import arms\n"
        "plan = arms.load_plan(Path(sys.argv[1]))\n"
        "sleep = ['sh', '-c', 'sleep 60 & echo $$ $!; wait']\n"
        "arms.command_line = lambda *_: sleep\n"
        "server = arms.serve(plan.arms[0], plan, Path('model'))\n"
        "while not server.log.read_text().endswith('\\n'): time.sleep(0.01)\n"
        "assert str(server.pid) == server.log.read_text().split()[0]\n"
        "print(server.log, flush=True)\n"
        "time.sleep(60)\n"
    )
    plan = Path(arms.__file__).parent / "arms" / "ample.toml"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(plan)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=LAUNCH.parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as tool:
        log = Path(tool.stdout.readline().strip())
        tool.kill()
    assert tool.returncode == -signal.SIGKILL
    assert_gone([int(pid) for pid in log.read_text().split()])


@pytest.fixture(scope="module")
def demo_chat():
    spec = importlib.util.spec_from_file_location("demo_chat", LAUNCH / "demo_chat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", KEY, "--server-id", "another"], "another server answers at"),
        (["--server-id", "ours"], "HTTP 401; it wants --api-key or OPENAI_API_KEY"),
        (["--server-pid", str(2**22 + 1), "--base-url", "http://127.0.0.1:9"], "the server ended"),
        (["--timeout", "0", "--base-url", "http://127.0.0.1:9"], "not ready within 0 s"),
        # Ours, which then cannot chat.
        (["--api-key", KEY, "--server-id", "ours"], "demo_chat: error: "),
    ],
)
def test_the_chats_are_with_the_server_that_was_started(keyed, demo_chat, arguments, said, capsys):
    code = demo_chat.main(["--base-url", keyed.base_url, *arguments])
    error = capsys.readouterr().err
    assert code == demo_chat.EXIT_BAD_INPUT
    assert said in error
    assert error.count("\n") == 1
