"""The demo as its user has it: chat, and Ctrl-C."""

import signal

import pytest
from openai import BadRequestError, OpenAI

from pascal_sglang.demo.budget import DemoThinkingBudget
from tests.harness import PASCAL, Server


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
        with pytest.raises(BadRequestError, match="no logit processors from clients"):
            client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Hello"}],
                extra_body={"custom_logit_processor": DemoThinkingBudget.to_str()},
            )
        assert server.instances()[0]["recent"][-1]["outcome"] == "answered"
        banners = [x for x in server.output.splitlines() if x.startswith("pascal_sglang: policy=")]
        assert len(banners) == 1
        server.stop(signal.SIGINT)
