"""Other ways in: SGLang's own command line, the demo, and Ctrl-C."""

import signal
import sys
import uuid
from pathlib import Path

import sglang as sgl
from openai import OpenAI

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from tests.harness import PASCAL, TINY_FLAGS, Server
from tests.requests import generate

SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")


@sgl.function
def one_call(s, question):
    s += question + sgl.gen("answer", max_tokens=10, temperature=0)


def test_sglang_serve_with_our_configuration_assumes_reasoning(tiny_model):
    env = {
        CONFIG_ENV: PascalConfig(assume_reasoning=True).to_json(),
        "SGLANG_PLATFORM": "pascal_cpu",
    }
    with Server(SERVE, ["--model-path", str(tiny_model), *TINY_FLAGS], env) as server:
        said_no = generate("Once", think=None, total=6, rid=uuid.uuid4().hex)
        server.post("/generate", {**said_no, "require_reasoning": False})
        assert server.recent(said_no["rid"])["answer_tokens"] == 6

        silent = generate("Once", think=None, total=6, rid=uuid.uuid4().hex)
        server.post("/generate", silent)
        assert server.recent(silent["rid"])["reasoning_tokens"] == 6

        state = one_call.run("Well?", backend=sgl.RuntimeEndpoint(server.base_url))
        assert state["answer"]
        (instance,) = server.instances()
        assert instance["recent"][-1]["reasoning_tokens"] == 10


def test_the_demo_thinks_and_answers_and_ctrl_c_ends_it():
    server = Server(PASCAL, ["--demo"])
    with server:
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120)
        model = client.models.list().data[0].id
        message = (
            client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                max_tokens=80,
            )
            .choices[0]
            .message
        )
        assert "Paris" in message.reasoning_content
        assert message.content
        assert "</think>" not in message.reasoning_content + message.content
        assert server.instances()[0]["recent"][-1]["outcome"] == "answered"
        banners = [x for x in server.output.splitlines() if x.startswith("pascal_sglang: policy=")]
        assert len(banners) == 1
        server.stop(signal.SIGINT)
