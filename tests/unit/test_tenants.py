"""Whose a request is, and how the scheduler is told."""

import asyncio
from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers

from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints.request_notes import note, noted
from pascal_sglang.entrypoints.tenants import digest, name_of
from pascal_sglang.request_checks import problem_with, tenant_of


@pytest.mark.parametrize(
    ("fairness", "headers", "body", "name"),
    [
        ("api-key", {"Authorization": "Bearer sk-1"}, None, "sk-1"),
        ("api-key", {"authorization": "bearer  sk-1 "}, None, "sk-1"),
        ("api-key", {"x-api-key": "sk-2"}, None, "sk-2"),
        ("api-key", {"Authorization": "Basic abc"}, None, ""),
        ("api-key", {}, {"user": "ann"}, ""),
        ("user", {}, {"user": "ann"}, "ann"),
        ("user", {}, {"user": 7}, ""),
        ("user", {"user": "ann"}, {}, ""),
        ("user", {}, ["user"], ""),
        ("header:X-Tenant", {"x-tenant": "blue"}, None, "blue"),
        ("header:X-Tenant", {"x-other": "blue"}, {"user": "ann"}, ""),
    ],
)
def test_whose_it_is(fairness, headers, body, name):
    assert name_of(fairness, Headers(headers), body) == name


def test_a_name_travels_as_a_digest():
    assert digest("") == ""
    assert len(digest("sk-1")) == 16
    assert digest("sk-1") != digest("sk-2")
    assert "sk" not in digest("sk-1")
    assert digest("\ud800"), "JSON may hold half a character"


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"custom_params": None},
        {"custom_params": {"thinking_budget": 3, "pascal": {"answer_tpot_ms": 40.0}}},
        {"custom_params": {"pascal": {"tenant": "somebody else"}}},
        {"custom_params": {"pascal": {"tenant": ["no", "text"]}}},
    ],
)
def test_the_scheduler_is_told_and_what_a_client_says_itself_is_overwritten(params):
    before = repr(params)
    obj = SimpleNamespace(sampling_params=params)
    note(obj, {"tenant": "t1"})
    own = obj.sampling_params["custom_params"]
    assert tenant_of(own) == "t1"
    assert repr(params) == before, "the client's own object stays"
    assert own.get("thinking_budget") == ((params or {}).get("custom_params") or {}).get(
        "thinking_budget"
    )
    assert problem_with(obj.sampling_params) is None
    batch = SimpleNamespace(sampling_params=[params, {}])
    note(batch, {"tenant": "t2"})
    assert [tenant_of(each["custom_params"]) for each in batch.sampling_params] == ["t2", "t2"]


@pytest.mark.parametrize("params", [7, {"custom_params": "x"}, {"custom_params": {"pascal": 3}}])
def test_parameters_that_are_none_are_left_for_sglang_to_refuse(params):
    obj = SimpleNamespace(sampling_params=params)
    note(obj, {"tenant": "t1"})
    assert obj.sampling_params == params


@pytest.mark.parametrize("says", [{"user": "ann"}, ValueError("no JSON"), RuntimeError("gone")])
def test_a_request_begins_once_it_has_its_tenant(says):
    async def body():
        if isinstance(says, Exception):
            raise says
        return says

    obj, seen = SimpleNamespace(sampling_params={}), []

    async def stream():
        try:
            seen.append(tenant_of(obj.sampling_params["custom_params"]))
            yield 1
            yield 2
        finally:
            seen.append("closed")

    async def first(request):
        config = PascalConfig(fairness="user")
        chunks = noted(stream, obj, request, config)
        assert await anext(chunks) == 1
        await chunks.aclose()

    asyncio.run(first(SimpleNamespace(headers=Headers({}), json=body)))
    expected = digest("ann") if isinstance(says, dict) else ""
    assert seen == [expected, "closed"]
    seen.clear()
    asyncio.run(first(None))
    assert seen == ["", "closed"]
