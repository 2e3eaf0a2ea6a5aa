"""A server-side thinking budget for requests that bring none of their own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput


@lru_cache(maxsize=1)
def _demo_processor() -> str:
    from pascal_sglang.demo.budget import DemoThinkingBudget

    processor: str = DemoThinkingBudget.to_str()
    return processor


def with_default_budget(
    recv_req: TokenizedGenerateReqInput, kwargs: dict[str, Any], budget: int | None
) -> dict[str, Any]:
    """The arguments of `Req` with a logit processor that closes thinking after `budget` tokens.

    Left alone: `budget` None, requests that do not think, and requests with a processor of their
    own. A `thinking_budget` in the request's `custom_params` wins over the default.
    """
    if budget is None or not recv_req.require_reasoning or recv_req.custom_logit_processor:
        return kwargs
    params = recv_req.sampling_params  # This request's own copy; `Req` is handed the same object.
    custom = params.custom_params if isinstance(params.custom_params, dict) else {}
    params.custom_params = {"thinking_budget": budget, **custom}
    return {**kwargs, "custom_logit_processor": _demo_processor()}
