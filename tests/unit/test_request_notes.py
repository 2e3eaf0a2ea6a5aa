"""What a scheduler is told of a request: whether tools were offered, and for how long its KV is to
be kept."""

import asyncio
from types import SimpleNamespace

import pytest

from pascal_sglang.config import ConfigError, PascalConfig
from pascal_sglang.entrypoints.request_notes import noted, offered_tools, takes_notes
from pascal_sglang.request_checks import (
    HINT_TYPE,
    HINT_VERSION,
    asked_tool_wait_s,
    problem_with,
    tools_of,
)

TOOL = {"type": "function", "function": {"name": "look_up"}}


@pytest.mark.parametrize(
    ("body", "tools"),
    [
        (None, ""),
        ([], ""),
        ({}, ""),
        ({"tools": []}, ""),
        ({"tool_choice": "required"}, ""),
        ({"tools": [TOOL]}, "auto"),
        ({"tools": [TOOL], "tool_choice": None}, "auto"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "auto"),
        ({"tools": [TOOL], "tool_choice": "none"}, ""),
        ({"tools": [TOOL], "tool_choice": "required"}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, "auto"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, ""),
        ({"tools": [TOOL], "tool_choice": "any"}, "required"),
        ({"tools": [TOOL], "tool_choice": "Auto"}, "auto"),
        ({"tools": [TOOL], "tool_choice": {}}, "auto"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look_up"}}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "auto"),
        ({"tools": [TOOL], "tool_choice": {"type": ["any"]}}, "auto"),
        ({"tools": [TOOL], "tool_choice": ["required"]}, "auto"),
    ],
)
def test_which_requests_offer_tools(body, tools):
    assert offered_tools(body) == tools


@pytest.mark.parametrize("fairness", ["off", "api-key"])
def test_tools_are_noted_beside_the_tenant_whatever_the_client_says(fairness):
    async def body():
        return {"tools": [TOOL]}

    async def stream():
        yield 1

    async def through(request):
        said = {"custom_params": {"pascal": {"tools": "required", "tool_wait_s": 3}}}
        obj = SimpleNamespace(sampling_params=said)
        config = PascalConfig(tool_kv=0.2, fairness=fairness)
        assert [chunk async for chunk in noted(stream, obj, request, config)] == [1]
        return obj.sampling_params["custom_params"]

    seen = asyncio.run(through(SimpleNamespace(headers={}, json=body)))
    assert tools_of(seen) == "auto"
    assert ("tenant" in seen["pascal"]) == (fairness != "off")
    assert asked_tool_wait_s(seen, None) == 3
    assert tools_of(asyncio.run(through(None))) == ""


def test_nothing_is_noted_unless_it_is_asked_for():
    assert not takes_notes(PascalConfig())
    assert takes_notes(PascalConfig(tool_kv=0.1))
    assert takes_notes(PascalConfig(fairness="user"))


@pytest.mark.parametrize("share", [-0.1, 0.95, True, "much"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="tool_kv must be a number"):
        PascalConfig(tool_kv=share)


def test_it_takes_a_policy_that_schedules():
    with pytest.raises(ConfigError, match="tool_kv is for a policy that schedules, not for fcfs"):
        PascalConfig(tool_kv=0.1, policy="fcfs")


def hints(seconds, **more):
    action = {"action_type": HINT_TYPE, "action_version": HINT_VERSION, "action_id": "1"}
    payload = {"seconds": seconds}
    return {"protocol_version": "1", "actions": [{**action, "payload": payload, **more}]}


def objects(hinted):
    """The same as SGLang makes it."""
    actions = [SimpleNamespace(**action) for action in hinted["actions"]]
    return SimpleNamespace(protocol_version="1", actions=actions)


@pytest.mark.parametrize("form", [dict, objects])
def test_hints_ask_for_a_time_and_go_before_parameters(form):
    own = {"pascal": {"tool_wait_s": 5}}
    assert asked_tool_wait_s(own, form(hints(9))) == 9
    assert asked_tool_wait_s(own, form(hints(0))) == 0
    for other in (
        hints(9, action_type="prefetch"),
        hints(9, action_version="2"),
        hints(9, payload=None),
        hints("long"),
        hints(1e9),
    ):
        assert asked_tool_wait_s(own, form(other)) == 5
    assert asked_tool_wait_s(None, form(hints(9))) == 9


@pytest.mark.parametrize("nothing", [None, 7, "x", {}, {"actions": None}, {"actions": ["x"]}])
def test_hints_that_say_nothing_say_nothing(nothing):
    assert asked_tool_wait_s(None, nothing) is None
    assert asked_tool_wait_s({"pascal": {"tool_wait_s": "x"}}, nothing) is None


@pytest.mark.parametrize("seconds", [-1, 601, True, "long", float("nan"), None])
def test_a_time_that_is_none_is_refused_before_anything_begins(seconds):
    config = PascalConfig(tool_kv=0.2)
    for given in (hints(seconds), [None, hints(seconds)]):
        obj = SimpleNamespace(rid=None, sampling_params={}, kv_hints=given)
        problem = config.problem_with_request(obj)
        assert problem is not None
        assert f"{HINT_TYPE} action in kv_hints must have seconds from 0 to 600" in problem
        assert PascalConfig().problem_with_request(obj) is None, "they are nobody's here"
    if seconds is not None:
        problem = problem_with({"custom_params": {"pascal": {"tool_wait_s": seconds}}})
        assert problem is not None
        assert "tool_wait_s must be a number of seconds from 0 to 600" in problem


@pytest.mark.parametrize("seconds", [0, 12.5, 600])
def test_a_time_that_may_be_asked_for_is_taken(seconds):
    obj = SimpleNamespace(
        rid=None,
        sampling_params={"custom_params": {"pascal": {"tool_wait_s": seconds}}},
        kv_hints=hints(seconds),
    )
    assert PascalConfig(tool_kv=0.2).problem_with_request(obj) is None
