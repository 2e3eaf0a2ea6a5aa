"""Policy `fcfs` answers token by token as stock SGLang; installed but unasked, we are absent."""

import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import PASCAL, STOCK, TINY_FLAGS, Server
from tests.ports import not_drawn
from tests.requests import generate

PROMPTS = [f"Question {i}: " + "why " * (i * 7 % 23) for i in range(24)]


def outputs(server):
    bodies = [
        generate(
            prompt,
            think=None if i % 3 == 0 else 5 + i,
            total=40 + i,
            return_logprob=True,
            stream=False,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda b: server.post("/generate", b), bodies))
    return [
        (
            r["output_ids"],
            r["text"],
            r["meta_info"]["reasoning_tokens"],
            r["meta_info"]["finish_reason"],
        )
        for r in replies
    ]


@pytest.fixture(scope="module")
def from_a_shell(tiny_model):
    """Stock SGLang as its users start it: every process imports everything by itself."""
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, *not_drawn()]
    with Server(STOCK, flags, {"SGLANG_PLATFORM": "pascal_cpu"}) as server:
        yield server


def test_same_tokens_as_stock(tiny_model, from_a_shell, stock_server):
    """Which are those of a fork too, by which other tests judge."""
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--pascal-policy", "fcfs"]
    expected = outputs(from_a_shell)
    with Server(PASCAL, flags, warm=True) as server:
        assert outputs(server) == expected
        assert server.instances()[0]["policy"] == "fcfs"
    assert outputs(stock_server) == expected


@pytest.mark.parametrize("how", ["from_a_shell", "stock_server"])
def test_unasked_we_are_not_there(how, request):
    server = request.getfixturevalue(how)
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get("/pascal/status")
    assert caught.value.code == 404
    assert "pascal:" not in server.get("/metrics")
    assert "pascal" not in server.get("/server_info")["internal_states"][0]
