"""When something of ours fails at run time, SGLang's order stands in and no request is lost."""

from types import SimpleNamespace

import pytest

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.governor import Governor, why_not_pausable
from pascal_sglang.engine.ladder import HostCopy


class Pool:
    """A pool that has rows, or none, and never any KV to give."""

    def __init__(self, rows):
        self.rows = rows
        self.freed = []

    def alloc(self, reqs):
        return list(range(len(reqs))) if self.rows else None

    def free(self, req):
        self.freed.append(req)


def scheduler(rows=1):
    return SimpleNamespace(
        waiting_queue=["waiting"],
        req_to_token_pool=Pool(rows),
        token_to_kv_pool_allocator=SimpleNamespace(alloc=lambda _: None),
        tree_cache=None,
        page_size=1,
    )


@pytest.fixture
def governor():
    made = Governor(scheduler(), PascalConfig(), host_budget_tokens=100)
    made._clock = lambda: 1.0
    return made


def test_a_failing_policy_is_counted_and_everybody_admitted(governor, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(governor, "before_batch", fail)
    running = SimpleNamespace(reqs=[])
    assert governor.govern(running, None) is running
    assert governor.errors == 1
    assert governor._admitted == ["waiting"]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_resume_the_pool_refuses_leaves_the_request_paused(governor, rows):
    governor.ladder.scheduler = scheduler(rows)
    copy = HostCopy(tokens=10, layers=None)
    governor.ladder.paused["request"] = copy
    assert governor.ladder.resume("request") is None
    assert governor.ladder.paused == {"request": copy}
    assert governor.ladder.scheduler.req_to_token_pool.freed == (["request"] if rows else [])


def request(**changes):
    params = {
        "json_schema": None,
        "regex": None,
        "ebnf": None,
        "structural_tag": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
    }
    fields = {
        "beam_group": None,
        "session": None,
        "session_id": None,
        "multimodal_inputs": None,
        "input_embeds": None,
        "lora_id": None,
        "return_hidden_states": False,
    }
    params |= {k: v for k, v in changes.items() if k in params}
    fields |= {k: v for k, v in changes.items() if k in fields}
    return SimpleNamespace(sampling_params=SimpleNamespace(**params), **fields)


def test_a_plain_request_can_be_paused():
    assert why_not_pausable(request()) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beam_group": object()}, "beam"),
        ({"session_id": "s"}, "session"),
        ({"lora_id": "l"}, "LoRA"),
        ({"regex": "a+"}, "grammar"),
        ({"min_new_tokens": 3}, "penalties"),
        ({"repetition_penalty": 1.2}, "penalties"),
        ({"return_hidden_states": True}, "hidden"),
    ],
)
def test_what_cannot_be_paused_says_why(change, reason):
    assert reason in why_not_pausable(request(**change))
