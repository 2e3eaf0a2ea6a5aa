"""Two instances, and two tensor-parallel ranks, on two cores."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from tests.harness import PASCAL, TINY_FLAGS, Server
from tests.requests import generate

PROMPTS = [f"Item {i}:" + " and" * (i % 9) for i in range(12)]


def ids(server):
    bodies = [generate(p, think=6, total=30, rid=uuid.uuid4().hex) for p in PROMPTS]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda b: server.post("/generate", b), bodies))
    for body in bodies:
        seen = server.recent(body["rid"])
        assert (seen["reasoning_tokens"], seen["answer_tokens"]) == (7, 23)
        assert 0 < seen["ttft_s"] < seen["ttfo_s"] < 60
    return [r["output_ids"] for r in replies]


def test_two_instances(pascal_server, tiny_model):
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--dp-size", "2"]
    with Server(PASCAL, flags) as server:
        assert ids(server) == ids(pascal_server)
        instances = server.instances()
        assert [i["dp_rank"] for i in instances] == [0, 1]
        assert all(i["ended"]["answered"] > 0 for i in instances)


def test_two_tensor_parallel_ranks(pascal_server, tiny_model):
    flags = ["--model-path", str(tiny_model), *TINY_FLAGS, "--tp-size", "2"]
    with Server(PASCAL, flags) as server:
        assert ids(server) == ids(pascal_server)
        assert len(server.instances()) == 1
