"""SGLang's operations on all requests reach those that are paused or in a migration.

Two instances with little memory, requests that are paused at random and that move at random.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pascal_sglang.demo.tiny import build_tiny_model
from tests.engine.operations import (
    CROWD,
    TOTAL,
    body_of,
    call,
    held,
    operate,
    pause_with_some_held,
    tokens_made,
)
from tests.engine.stage import Reader
from tests.engine.test_crowded_pair import crowded  # noqa: F401
from tests.engine.test_migration import at_rest, nothing_left


def asked(server, bodies):
    """The output ids of each, sent all at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [r["output_ids"] for r in pool.map(lambda b: server.post("/generate", b), bodies)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def whole(crowded):
    """What the crowd answers when nothing is done to it."""
    return asked(crowded, [body_of(i) for i in range(CROWD)])


def test_a_weight_update_reaches_everybody(crowded, whole, tiny_model, other_model):
    """Tokens before it are the old model's, tokens after it the new one's, of everybody."""
    readers = [Reader(crowded, body_of(i)) for i in range(CROWD)]
    before = pause_with_some_held(crowded)
    # Nothing runs, moves or is brought back, and KV in use is not flushed.
    relabelled = tokens_made(before)
    operate(crowded, "/update_weight_version", new_version="first", abort_all_requests=False)
    assert call(crowded, "/flush_cache")[0] == 400
    time.sleep(0.3)
    after = crowded.instances()
    for was, now in zip(before, after, strict=True):
        for key in ("requests", "paused", "pauses", "queued", "kv_tokens", "waiting"):
            if key == "requests":
                continue
            assert was[key] == now[key], key
    assert tokens_made(after) == relabelled
    operate(crowded, "/continue_generation")
    deadline = time.monotonic() + 30
    while tokens_made(crowded.instances()) == relabelled:
        assert time.monotonic() < deadline
    pause_with_some_held(crowded)
    operate(crowded, "/pause_generation", mode="retract")
    instances = crowded.instances()
    made = tokens_made(instances)
    assert [i["paused"] for i in instances] == [0, 0]
    assert sum(i["waiting"] for i in instances) == len(made)
    assert all(i["kv_tokens"]["host"] == 0 for i in instances)
    operate(crowded, "/flush_cache")
    assert all(i["kv_tokens"]["free"] == i["kv_tokens"]["capacity"] for i in crowded.instances())
    update = {"model_path": str(other_model), "weight_version": "second"}
    assert json.loads(operate(crowded, "/update_weights_from_disk", **update))["success"]
    operate(crowded, "/continue_generation")
    ends = [reader.end() for reader in readers]
    assert [e for _, e in ends] == [["length"]] * CROWD
    spans = [reader.meta["weight_versions"] for reader in readers]
    for i, (versions, ids) in enumerate(zip(spans, (ids for ids, _ in ends), strict=True)):
        if str(i) not in made:
            continue
        edges = [("default", relabelled.get(str(i), TOTAL)), ("first", made[str(i)]), ("second", TOTAL)]
        expected, start = [], 0
        for version, end in edges:
            if end > start:
                expected.append({"version": version, "start": start, "end": end})
                start = end
        assert versions == expected, i
    started = [i for i in range(CROWD) if made.get(str(i))]
    assert len(started) > CROWD / 2
    for i in started:
        assert ends[i][0][: made[str(i)]] == whole[i][: made[str(i)]]
    again = asked(crowded, [body_of(i, ends[i][0][: made[str(i)]]) for i in started])
    different = [i for i, ids in zip(started, again, strict=True) if ends[i][0][made[str(i)] :] != ids]
    assert different == []
    assert any(ends[i][0] != whole[i] for i in started)
    update = {"model_path": str(tiny_model), "weight_version": "default"}
    assert json.loads(operate(crowded, "/update_weights_from_disk", **update))["success"]
    nothing_left(at_rest(crowded))


def chat_of(i):
    body = body_of(i)
    sampling = body["sampling_params"]
    more = {} if i % 3 else {"chat_template_kwargs": {"enable_thinking": False}}
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"question {i} " * 3}],
        "temperature": 0,
        "max_tokens": TOTAL,
        "ignore_eos": True,
        "rid": body["rid"],
        "custom_logit_processor": body.get("custom_logit_processor"),
        "custom_params": sampling.get("custom_params"),
        **more,
    }


def test_aborted_requests_return_the_tokens_they_have(crowded, whole):
    """Those that run, are paused, wait to be prefilled again or move; streamed or not, on both
    interfaces, with true usage."""
    kinds = [("/generate", False), ("/generate", True), ("/v1/chat/completions", False),
             ("/v1/chat/completions", True)]

    def one(i):
        path, stream = kinds[i % 4]
        body = chat_of(i) if "chat" in path else body_of(i)
        if not stream:
            return body["rid"], crowded.post(path, body)
        more = {"stream_options": {"include_usage": True}} if "chat" in path else {}
        return body["rid"], crowded.stream(path, {**body, **more})

    with ThreadPoolExecutor(CROWD) as pool:
        replies = [pool.submit(one, i) for i in range(CROWD)]
        pause_with_some_held(crowded)
        operate(crowded, "/abort_request", abort_all=True)
        operate(crowded, "/continue_generation")
        replies = [reply.result() for reply in replies]
    nothing_left(at_rest(crowded))
    began = 0
    for i, (rid, reply) in enumerate(replies):
        path, stream = kinds[i % 4]
        ended = crowded.recent(rid)
        made = ended["reasoning_tokens"] + ended["answer_tokens"]
        assert ended["outcome"] == "aborted"
        if not made:
            continue
        began += 1
        if path == "/generate":
            last = reply[-1] if stream else reply
            assert last["output_ids"] == whole[i][:made]
            assert last["meta_info"]["finish_reason"]["type"] == "abort"
            usage = last["meta_info"]
            assert usage["prompt_tokens"] == 20 + i
        elif stream:
            usage = reply[-1]["usage"]
            assert usage["prompt_tokens"] > 0
        else:
            usage = reply["usage"]
            assert reply["choices"][0]["finish_reason"] == "abort"
            assert usage["prompt_tokens"] > 0
        assert usage["completion_tokens"] == made, (i, path, stream)
    assert began > CROWD / 2
