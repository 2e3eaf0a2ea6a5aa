"""The quickstart as its user has it: a key, chats, a burst, and Ctrl-C when nobody reads."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import psutil
import pytest
from openai import BadRequestError, OpenAI

from evals.load.server import START_TIMEOUT_S, STOP_TIMEOUT_S
from pascal_sglang.demo.budget import DemoThinkingBudget
from tests.harness import BASH, environment
from tests.ports import free_port

QUICKSTART = Path(__file__).parents[2] / "launch" / "quickstart.sh"
KEY = "s3cret"
CHATS_TIMEOUT_S = 300


def test_the_demo_thinks_and_answers_and_ctrl_c_ends_it():
    port = str(free_port())
    quickstart = subprocess.Popen(
        [*BASH, str(QUICKSTART), "--port", port, "--requests", "3", "--api-key", KEY],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment({"PASCAL_PYTHON": sys.executable}),
        start_new_session=True,
    )
    hung = threading.Timer(START_TIMEOUT_S + CHATS_TIMEOUT_S, quickstart.kill)
    hung.start()
    try:
        said = ""
        while "Ctrl-C stops it" not in said:
            line = quickstart.stdout.readline()
            assert line, said
            said += line
        started = psutil.Process(quickstart.pid).children(recursive=True)
        # Three chats, each with its times, and what the server measured of them.
        assert said.count("  TTFT ") == 3
        assert "(no answer)" not in said
        assert said.count("thinking + ") == 3
        assert said.count("pascal_sglang: policy=") == 1
        assert f"http://127.0.0.1:{port}/pascal/" in said
        # The same burst in both orders, whole.
        assert re.findall(r"^ *(\w+): mean TTFO +[\d.]+ s, \d of 3", said, re.M) == [
            "fcfs",
            "pascal",
        ]
        ask(port)
    finally:
        hung.cancel()
        quickstart.stdout.close()
        os.killpg(quickstart.pid, signal.SIGINT)
        try:
            assert quickstart.wait(STOP_TIMEOUT_S) == 128 + signal.SIGINT
        finally:
            quickstart.kill()  # Its server goes with it.
    assert len(started) > 3
    _, left = psutil.wait_procs(started, timeout=60)
    assert [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def ask(port):
    """Any OpenAI client works, and the server tells of it to those who have the key."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120)
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=80,
    )
    message = answer.choices[0].message
    assert "Paris" in message.reasoning_content
    assert message.content
    assert "</think>" not in message.reasoning_content + message.content
    with pytest.raises(BadRequestError, match="no logit processors from clients"):
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hello"}],
            extra_body={"custom_logit_processor": DemoThinkingBudget.to_str()},
        )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/pascal/status", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        (instance,) = json.load(reply)["instances"]
    assert instance["recent"][-1]["outcome"] == "answered"
