"""An agent's turns under memory pressure: what its conversation has comes back by a copy."""

import json
import time
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from pascal_sglang.demo.budget import TinyOwnLengths
from pascal_sglang.demo.tiny import LETTER_IDS
from pascal_sglang.policy.tool_waits import OPENING
from tests.engine.conftest import LATE
from tests.engine.inproc.conftest import is_before
from tests.engine.operations import call, operate
from tests.requests import chat, generate

# The reference platform has no larger pages before that release.
PAGE = 1 if is_before("0.5.22") else 16
FLAGS = ["--max-total-tokens", "2560", "--page-size", str(PAGE)]
FLAGS += ["--tool-call-parser", "qwen", "--enable-cache-report"]
SETTINGS = {"policy": "pascal", "host_kv_gb": 0.05, "tool_kv": 0.5}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
}
# What makes the tiny model call it, whatever its weights.
CALL = r'<tool_call>\n\{"name": "look_up", "arguments": \{"ok": (true|false)\}\}\n</tool_call>'
FIRST, LAST = LETTER_IDS
SETTLED_S = 60.0


def tokens(seed, count):
    """A prompt of letters that begins like no other."""
    letters = LAST - FIRST + 1
    digits = [seed // letters**place % letters for place in range(4)]
    return [FIRST + (digits[k % 4] + k // 4) % letters for k in range(count)]


class Crowd:
    """Requests that take the whole pool of an instance, one after the other: what is cached is
    evicted."""

    def __init__(self, server, number=0, rank=None):
        self.server, self.number, self.rank = server, number, rank

    def pass_by(self):
        for _ in range(5):
            self.number += 1
            body = generate("", None, 4, routed_dp_rank=self.rank)
            del body["text"]
            self.server.post("/generate", {**body, "input_ids": tokens(self.number, 700)})


def kept(server, rank=0):
    """What an instance has of such conversations."""
    return server.instances()[rank]["tool_calls"]


def until(server, holds, rank=0):
    """The same once it is like that."""
    deadline = time.monotonic() + SETTLED_S
    while not holds(status := kept(server, rank)):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


def agent(server, between):
    """Three turns through a client that runs tools: what it was answered, and of each turn the
    tokens of its prompt and how many of them were cached."""
    messages = [{"role": "user", "content": "Find it out. " + "abcdefghij " * 50}]
    answers, prompts, cached = [], [], []
    for more in (
        {"regex": CALL},
        {"regex": CALL, "tool_choice": "auto"},
        {"ignore_eos": True, "max_tokens": 40},
    ):
        body = {**chat("", think=12, total=120, tools=[TOOL]), "ignore_eos": False, **more}
        status, text = call(server, "/v1/chat/completions", {**body, "messages": messages})
        assert status == 200, text
        reply = json.loads(text)
        (choice,) = reply["choices"]
        message = choice["message"]
        calls = message.get("tool_calls") or []
        said = [(each["function"]["name"], each["function"]["arguments"]) for each in calls]
        answers.append((message["reasoning_content"], message["content"], said))
        prompts.append(reply["usage"]["prompt_tokens"])
        # SGLang 0.5.21 leaves them out where nothing was cached.
        details = reply["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
        cached.append(details["cached_tokens"])
        messages.append({"role": "assistant", "content": message["content"], "tool_calls": calls})
        messages += [
            {"role": "tool", "tool_call_id": each["id"], "content": "It is so. " * 12}
            for each in calls
        ]
        between()
    return answers, prompts, cached


def total(metrics, name, **labels):
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items())
    ]
    assert found, f"{name} with {labels} is missing"
    return sum(found)


@pytest.fixture(scope="module")
def keeping(serve):
    """A server that keeps KV of waiting conversations, on a device whose copies come late."""
    with serve(SETTINGS, FLAGS, LATE) as server:
        yield server
        (instance,) = server.instances()
        assert instance["policy_errors"] == instance["queue_errors"] == 0
        kv = instance["kv_tokens"]
        assert kv["free"] + kv["evictable"] == kv["capacity"]


def test_an_agents_turns_resume_by_copy_with_the_same_tokens(serve, keeping):
    with serve({"policy": "pascal"}, FLAGS) as server:
        expected, prompts, cached = agent(server, Crowd(server).pass_by)
        assert kept(server) is None
        spoken = conversation(server, 3001, Crowd(server, 300).pass_by)
    assert cached == [0, 0, 0], "the crowd leaves nothing of it"
    assert [len(said) for _, _, said in expected] == [1, 1, 0]
    found, same_prompts, cached = agent(keeping, Crowd(keeping).pass_by)
    assert (found, same_prompts) == (expected, prompts)
    assert cached[0] == 0
    pairs = zip(prompts[:-1], cached[1:], strict=True)
    assert all(again > before - OPENING - PAGE for before, again in pairs)
    status = until(keeping, lambda s: s["counts"].get("copied") == 2)
    assert status["counts"]["copied_tokens"] == sum(cached)
    assert status["counts"]["saved"] == 2
    assert (status["waiting"], status["host_tokens"]) == (0, 0), "the last reply called nothing"
    deadline = time.monotonic() + SETTLED_S
    while total(keeping.get("/metrics"), "pascal:tool_turns_total", outcome="copied") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    metrics = keeping.get("/metrics")
    assert total(metrics, "pascal:tool_kv_tokens_total", way="copied") == sum(cached)
    assert total(metrics, "pascal:tool_kv_bytes") == 0
    assert total(metrics, "pascal:tool_kv_capacity_bytes") > 0
    assert conversation(keeping, 3001, Crowd(keeping, 300).pass_by) == spoken
    assert kept(keeping)["counts"]["copied"] == 5


def ask(server, ids, **more):
    """A request for a few tokens more; its tokens, and how many were cached."""
    body = generate("", None, 6)
    del body["text"]
    # It ends by a stop token: one that runs out of tokens is not expected to go on.
    body["sampling_params"] |= {"ignore_eos": False, "max_new_tokens": 400}
    body["sampling_params"]["stop_token_ids"] = list(range(FIRST, LAST + 1))
    params = more.pop("sampling_params", {})
    body["sampling_params"] |= params
    reply = server.post("/generate", {**body, "input_ids": ids, **more})
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    return reply["output_ids"], reply["meta_info"]["cached_tokens"]


def conversation(server, seed, between):
    """Four turns, each with all of the earlier ones in its prompt; its tokens."""
    spoken = tokens(seed, 600)
    for turn in range(4):
        output, _ = ask(server, spoken, **wait_for(0 if turn == 3 else 600))
        spoken = [*spoken, *output, *tokens(seed + turn, 20)]
        between()
    return spoken


def wait_for(seconds):
    return {"sampling_params": {"custom_params": {"pascal": {"tool_wait_s": seconds}}}}


def copied(server):
    return kept(server)["counts"].get("copied", 0)


def test_a_full_prefix_cache_is_no_pressure_and_evicts_what_waits_last(serve):
    """All that passes by is as much as the pool, and a chunk is all that a step takes of it."""
    with serve(SETTINGS, [*FLAGS, "--chunked-prefill-size", "256"]) as server:
        conversation(server, 4001, Crowd(server, 400).pass_by)
        counts = kept(server)["counts"]
        assert (counts.get("resident"), counts.get("saved", 0)) == (3, 0), counts


def test_a_request_may_ask_for_it_and_flush_abort_and_time_end_it(keeping):
    crowd, before = Crowd(keeping, 100), copied(keeping)

    def saved(seed, seconds):
        """A conversation whose KV is in host memory alone; its tokens so far."""
        prompt = tokens(1000 + seed, 600)
        output, _ = ask(keeping, prompt, **wait_for(seconds))
        crowd.pass_by()
        return prompt + output

    spoken = saved(1, 600)
    assert until(keeping, lambda s: s["host_tokens"] > 600 - PAGE)["waiting"] == 1
    _, cached = ask(keeping, [*spoken, *tokens(3, 50)])
    assert cached >= (len(spoken) - 1) // PAGE * PAGE, "the last token is prefilled"
    assert copied(keeping) == before + 1
    assert kept(keeping)["host_tokens"] == 0

    spoken = saved(2, 0)
    assert kept(keeping)["waiting"] == 0, "it asked for nothing to be kept"

    spoken = saved(3, 600)
    operate(keeping, "/flush_cache")
    assert (kept(keeping)["waiting"], kept(keeping)["host_tokens"]) == (0, 0)
    assert ask(keeping, [*spoken, *tokens(4, 50)])[1] == 0

    spoken = saved(4, 600)
    assert kept(keeping)["host_tokens"] > 600 - PAGE
    operate(keeping, "/abort_request", abort_all=True)
    until(keeping, lambda s: (s["waiting"], s["host_tokens"]) == (0, 0))

    spoken = saved(5, 1)
    status = until(keeping, lambda s: s["counts"].get("expired", 0) > 0)
    assert status["host_tokens"] == 0
    assert ask(keeping, [*spoken, *tokens(5, 50)])[1] == 0
    assert copied(keeping) == before + 1

    other = [*tokens(1006, 600)]
    ask(keeping, other, extra_key="a", **wait_for(600))
    crowd.pass_by()
    assert until(keeping, lambda s: s["host_tokens"] > 600 - PAGE)["waiting"] == 1
    assert ask(keeping, [*other, *tokens(6, 50)], extra_key="b")[1] == 0
    operate(keeping, "/abort_request", abort_all=True)
    until(keeping, lambda s: s["waiting"] == 0)


def test_kv_hints_ask_for_it_too(keeping):
    crowd, before = Crowd(keeping, 200), copied(keeping)
    action = {"action_id": "1", "action_type": "pascal.tool_wait", "action_version": "1"}

    def hints(seconds):
        asked = {**action, "payload": {"seconds": seconds}}
        return {"protocol_version": "1", "message_id": "m", "actions": [asked]}

    prompt = tokens(2001, 600)
    output, _ = ask(keeping, prompt, kv_hints=hints(600))
    crowd.pass_by()
    _, cached = ask(keeping, [*prompt, *output, *tokens(7, 50)])
    assert cached > len(prompt) - PAGE
    assert copied(keeping) == before + 1
    status, text = call(keeping, "/generate", {"text": "Hm", "kv_hints": hints("long")})
    assert status == 400
    assert "must have seconds from 0 to 600" in json.loads(text)["error"]["message"]


def test_a_time_that_is_none_is_refused(keeping):
    body = {**chat("Hm", None, 4), "custom_params": {"pascal": {"tool_wait_s": -1}}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        keeping.post("/v1/chat/completions", body)
    assert caught.value.code == 400
    assert "tool_wait_s must be a number of seconds" in caught.value.read().decode()


@pytest.fixture(scope="module")
def pair(serve):
    settings = {**SETTINGS, "migration": "drain"}
    with serve(settings, [*FLAGS, "--dp-size", "2"]) as server:
        yield server
        for instance in server.instances():
            assert instance["policy_errors"] == instance["queue_errors"] == 0
            kv = instance["kv_tokens"]
            assert kv["free"] + kv["evictable"] == kv["capacity"]
        assert server.get("/pascal/status")["controller"]["errors"] == {}


def saved(server, seed, rank):
    """A conversation whose KV is in host memory alone; its tokens so far."""
    spoken = tokens(seed, 600)
    output, _ = ask(server, spoken, routed_dp_rank=rank, **wait_for(600))
    Crowd(server, 10 * seed, rank=rank).pass_by()
    until(server, lambda s: s["host_tokens"] > 600 - PAGE, rank)
    return [*spoken, *output]


def test_the_next_turn_goes_to_the_instance_that_keeps_its_kv_and_past_it_when_it_is_drained(pair):
    before = [Counter(kept(pair, rank)["counts"]) for rank in range(2)]

    def more():
        found = [Counter(kept(pair, rank)["counts"]) - before[rank] for rank in range(2)]
        names = ("copied", "elsewhere", "resident")
        return [{name: each[name] for name in names if each[name]} for each in found]

    spoken = [*saved(pair, 511, 1), *tokens(521, 50)]
    output, cached = ask(pair, spoken, **wait_for(600))
    assert cached > 600 - PAGE
    assert more() == [{}, {"copied": 1}]

    # A drain keeps what is kept, and serves on with it.
    Crowd(pair, 530, rank=1).pass_by()
    operate(pair, "/pascal/drain", dp_rank=1)
    operate(pair, "/pascal/undrain", dp_rank=1)
    spoken = [*spoken, *output, *tokens(531, 50)]
    output, cached = ask(pair, spoken, **wait_for(600))
    assert cached > 650 - PAGE
    assert more() == [{}, {"copied": 2}]

    # What is drained gives it up for a turn that goes elsewhere, which is prefilled there.
    Crowd(pair, 540, rank=1).pass_by()
    until(pair, lambda s: s["host_tokens"] > 700 - PAGE, 1)
    operate(pair, "/pascal/drain", dp_rank=1)
    spoken = [*spoken, *output, *tokens(541, 50)]
    output, cached = ask(pair, spoken, **wait_for(600))
    assert cached == 0
    status = until(pair, lambda s: s["waiting"] == 0, 1)
    assert status["host_tokens"] == 0
    assert more() == [{}, {"copied": 2, "elsewhere": 1}]
    operate(pair, "/pascal/undrain", dp_rank=1)
    _, cached = ask(pair, [*spoken, *output, *tokens(551, 50)], **wait_for(0))
    assert cached > 750 - PAGE
    assert more() == [{"resident": 1}, {"copied": 2, "elsewhere": 1}]


def test_a_reply_that_migrated_is_kept_where_it_ended(pair):
    body = generate("", think=None, total=1600)
    del body["text"]
    custom = {"own_lengths": [1500, 20], "pascal": {"tool_wait_s": 600}}
    body["sampling_params"] |= {"ignore_eos": False, "custom_params": custom}
    body |= {"input_ids": tokens(561, 300), "custom_logit_processor": TinyOwnLengths.to_str()}
    body |= {"require_reasoning": True, "routed_dp_rank": 1}
    before = [kept(pair, rank)["waiting"] for rank in range(2)]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(pair.post, "/generate", body, 300)
        deadline = time.monotonic() + SETTLED_S
        while not any(r["reasoning_tokens"] for r in pair.instances()[1]["requests"]):
            assert time.monotonic() < deadline
        operate(pair, "/pascal/drain", dp_rank=1)
        reply = job.result()
    operate(pair, "/pascal/undrain", dp_rank=1)
    instances = pair.instances()
    assert len(reply["output_ids"]) == 1521
    assert instances[0]["migrations"]["incoming"].get("taken") == 1
    assert [kept(pair, rank)["waiting"] for rank in range(2)] == [before[0] + 1, before[1]]
    _, cached = ask(pair, [*body["input_ids"], *reply["output_ids"], *tokens(571, 30)])
    assert cached > 700 - PAGE
    assert kept(pair, 0)["waiting"] == before[0]
