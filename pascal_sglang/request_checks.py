"""What a request may say about its own scheduling, in `custom_params["pascal"]`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, TypeGuard

from pascal_sglang.policy.request import Reader

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
        for name in SWITCHES:
            value = asked(custom, name)
            if value is not None and not isinstance(value, bool):
                return f"custom_params.pascal.{name} must be true or false, not {value!r:.40}"
    return None
