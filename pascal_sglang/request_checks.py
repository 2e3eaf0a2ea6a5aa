"""What a request may say about its own scheduling, in `custom_params["pascal"]`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeGuard

from pascal_sglang.policy.request import Reader
from pascal_sglang.policy.tool_waits import MOST_KEEP_S

# Milliseconds per answering token that a request may ask for, both included. Nobody reads faster,
# and what `--pascal-pace-stream` holds back at most (1,024 tokens) leaves within three hours.
ASKED_TPOT_MS = (1.0, 10_000.0)


# Fields of SGLang's sampling parameters that ask for an answer of a given structure.
STRUCTURED = ("json_schema", "regex", "ebnf", "structural_tag")
READERS = tuple(each.value for each in Reader)
# The longest time to an answer that a request may name, in seconds.
MOST_DEADLINE_S = 86_400.0
# What a request says by true or false: whether comments in its stream forecast its answer, and
# whether `--pascal-brownout` may cap its thinking.
SWITCHES = ("eta_comments", "brownout")
# What `tools` says of a request, as the process that serves HTTP noted it: the reply may call one
# of the tools that were offered, or must.
TOOLS = ("auto", "required")
# The action of SGLang's `kv_hints` that asks for the same; its payload is `{"seconds": ...}`.
HINT_TYPE, HINT_VERSION = "pascal.tool_wait", "1"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is a number that can be compared; not `True`, and not NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value))


def asked(custom_params: object, name: str) -> object:
    """What the request asks for as `name`, whatever it is; None if it says nothing."""
    own = custom_params.get("pascal") if isinstance(custom_params, dict) else None
    return own.get(name) if isinstance(own, dict) else None


def tenant_of(custom_params: object) -> str:
    """Whose the request is, as the process that serves HTTP noted it; empty where it did not."""
    tenant = asked(custom_params, "tenant")
    return tenant if isinstance(tenant, str) else ""


def tools_of(custom_params: object) -> str:
    """Whether the reply may or must call tools, one of `TOOLS`; empty where none were offered."""
    tools = asked(custom_params, "tools")
    return tools if isinstance(tools, str) and tools in TOOLS else ""


def asked_tool_wait_s(custom_params: object, kv_hints: object) -> float | None:
    """For how long the request asks that its KV be kept for a next one, in seconds, 0 for not at
    all; None where it does not say. Its `kv_hints` go before its parameters."""
    for said in (*_hinted(kv_hints), asked(custom_params, "tool_wait_s")):
        if is_number(said) and 0 <= said <= MOST_KEEP_S:
            return float(said)
    return None


def _hinted(kv_hints: object) -> Iterator[object]:
    """What actions of ours in an envelope of SGLang's say, whatever it is. An envelope is JSON
    before SGLang takes it, and an object of SGLang's later."""

    def get(holder: object, name: str) -> object:
        return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)

    actions = get(kv_hints, "actions")
    for action in actions if isinstance(actions, list) else []:
        if (get(action, "action_type"), get(action, "action_version")) == (HINT_TYPE, HINT_VERSION):
            yield get(get(action, "payload"), "seconds")


def problem_with_hints(kv_hints: object) -> str | None:
    """What is wrong with the actions of ours in the `kv_hints` of a request, or of all requests of
    a batch; None if nothing is."""
    for envelope in kv_hints if isinstance(kv_hints, list) else [kv_hints]:
        for said in _hinted(envelope):
            if not (is_number(said) and 0 <= said <= MOST_KEEP_S):
                return (
                    f"the payload of a {HINT_TYPE} action in kv_hints must have seconds from 0 to "
                    f"{MOST_KEEP_S:g}, not {said!r:.40}"
                )
    return None


def thinking_budget_of(custom_params: object) -> int | None:
    """Thinking tokens after which the request's thinking is closed, as SGLang's logit processors
    read it; None where it asks for no end."""
    budget = custom_params.get("thinking_budget") if isinstance(custom_params, dict) else None
    return budget if isinstance(budget, int) and budget >= 0 else None


def reader_of(streamed: bool, sampling: object) -> Reader:
    """Who reads the answer: what the request says, a human where it names a pace, or else a
    program, unless it is streamed free text.

    sampling: the request's sampling parameters, as they came or as SGLang's object."""
    of = sampling.get if isinstance(sampling, dict) else partial(getattr, sampling)
    custom_params = of("custom_params", None)
    said = asked(custom_params, "reader")
    if said in READERS:
        return Reader(said)
    if is_number(asked(custom_params, "answer_tpot_ms")):
        return Reader.HUMAN
    structured = any(of(name, None) is not None for name in STRUCTURED)
    return Reader.HUMAN if streamed and not structured else Reader.PROGRAM


def problem_with(sampling_params: Any) -> str | None:
    """What is wrong with the sampling parameters of a request, or of all requests of a batch, as
    far as they are ours; None if nothing is."""
    low, high = ASKED_TPOT_MS
    each = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    for params in each:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        own = custom.get("pascal") if isinstance(custom, dict) else None
        if own is not None and not isinstance(own, dict):
            return f"custom_params.pascal must be an object, not {own!r:.40}"
        pace, reader = asked(custom, "answer_tpot_ms"), asked(custom, "reader")
        if pace is not None and not (is_number(pace) and low <= pace <= high):
            return (
                "custom_params.pascal.answer_tpot_ms must be a number of milliseconds from "
                f"{low:g} to {high:g}, not {pace!r:.40}"
            )
        if reader is not None and reader not in READERS:
            return f"custom_params.pascal.reader must be {' or '.join(READERS)}, not {reader!r:.40}"
        deadline = asked(custom, "ttfo_deadline_s")
        if deadline is not None and not (is_number(deadline) and 0 < deadline <= MOST_DEADLINE_S):
            return (
                "custom_params.pascal.ttfo_deadline_s must be a number of seconds above 0 and at "
                f"most {MOST_DEADLINE_S:g}, not {deadline!r:.40}"
            )
        wait = asked(custom, "tool_wait_s")
        if wait is not None and not (is_number(wait) and 0 <= wait <= MOST_KEEP_S):
            return (
                "custom_params.pascal.tool_wait_s must be a number of seconds from 0 to "
                f"{MOST_KEEP_S:g}, not {wait!r:.40}"
            )
        for name in SWITCHES:
            value = asked(custom, name)
            if value is not None and not isinstance(value, bool):
                return f"custom_params.pascal.{name} must be true or false, not {value!r:.40}"
    return None
