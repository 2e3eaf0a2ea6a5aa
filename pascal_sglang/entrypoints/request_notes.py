"""What the process that serves HTTP knows of a request and its scheduler needs: whose it is
(`--pascal-fairness`), and whether tools were offered (`--pascal-tool-kv`).

It travels in `custom_params["pascal"]`. What a client puts there itself is overwritten.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any

from pascal_sglang.config import PascalConfig
from pascal_sglang.entrypoints import answer_eta
from pascal_sglang.entrypoints.tenants import digest, name_of

# Values of `tool_choice` that say that a tool must be called, and its `type` where it is an object.
REQUIRE = frozenset({"required", "any"})
TYPES_THAT_REQUIRE = frozenset({"function", "custom", "tool", "any"})


def takes_notes(config: PascalConfig) -> bool:
    """Whether anything is noted of requests."""
    return config.fairness != "off" or config.tool_kv > 0


def offered_tools(body: object) -> str:
    """Whether the reply to an HTTP request may call tools (`auto`) or must (`required`); empty
    where it cannot. body: its JSON, in the form of OpenAI or of Anthropic."""
    if not (isinstance(body, dict) and body.get("tools")):
        return ""
    choice = body.get("tool_choice")
    kind, requires = choice, REQUIRE
    if isinstance(choice, dict):
        kind, requires = choice.get("type"), TYPES_THAT_REQUIRE
    if kind == "none":
        return ""
    # What else a client may write is SGLang's to refuse or to ignore.
    return "required" if isinstance(kind, str) and kind in requires else "auto"


def note(obj: Any, notes: Mapping[str, str]) -> None:
    """Put notes into the sampling parameters of a request, or of all requests of a batch."""
    params = obj.sampling_params
    if isinstance(params, list):
        obj.sampling_params = [_with_notes(each, notes) for each in params]
    else:
        obj.sampling_params = _with_notes(params, notes)


def _with_notes(params: Any, notes: Mapping[str, str]) -> Any:
    params = {} if params is None else params
    custom = params.get("custom_params") if isinstance(params, dict) else None
    custom = {} if custom is None else custom
    own = custom.get("pascal") if isinstance(custom, dict) else None
    own = {} if own is None else own
    if not (isinstance(params, dict) and isinstance(custom, dict) and isinstance(own, dict)):
        return params  # SGLang's to refuse.
    return {**params, "custom_params": {**custom, "pascal": {**own, **notes}}}


async def noted(
    start: Callable[[], AsyncGenerator[Any, None]], obj: Any, request: Any, config: PascalConfig
) -> AsyncGenerator[Any, None]:
    """The stream that `start` begins, once the request has its notes and, where tenants are told
    apart, has been decided on. request: the HTTP request; None for one that came another way, which
    has no name and offers no tools."""
    body = None
    if request is not None and (config.fairness == "user" or config.tool_kv > 0):
        # A body that is no JSON has no such field, and gRPC's requests have none at all.
        with suppress(ValueError, RuntimeError, AttributeError):
            body = await request.json()  # Parsed once and cached by Starlette.
    notes = {}
    if config.fairness != "off":
        name = "" if request is None else name_of(config.fairness, request.headers, body)
        notes["tenant"] = digest(name)
    if config.tool_kv > 0:
        notes["tools"] = offered_tools(body)
    note(obj, notes)
    if "tenant" in notes:
        answer_eta.decide(obj, notes["tenant"])
    stream = start()
    try:
        async for chunk in stream:
            yield chunk
    finally:
        await stream.aclose()
