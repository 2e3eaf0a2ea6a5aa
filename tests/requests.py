"""Request bodies for the tiny model, whose thinking ends when the test says so."""

from __future__ import annotations

from typing import Any


def thinking(tokens: int) -> dict[str, Any]:
    """The fields that make the tiny model think for `tokens` tokens and then close its thinking."""
    from pascal_sglang.demo.budget import TinyThinkingBudget

    return {
        "custom_logit_processor": TinyThinkingBudget.to_str(),
        "custom_params": {"thinking_budget": tokens},
    }


def generate(prompt: str, think: int | None, total: int, **more: Any) -> dict[str, Any]:
    """A `/generate` body: `think` thinking tokens (None: does not think) of `total` new tokens."""
    sampling = {"temperature": 0, "max_new_tokens": total, "ignore_eos": True}
    body: dict[str, Any] = {"text": prompt, "sampling_params": sampling, **more}
    if think is not None:
        fields = thinking(think)
        body["custom_logit_processor"] = fields["custom_logit_processor"]
        sampling["custom_params"] = fields["custom_params"]
        body.setdefault("require_reasoning", True)
    return body


def chat(prompt: str, think: int | None, total: int, **more: Any) -> dict[str, Any]:
    """A `/v1/chat/completions` body with the same meaning as `generate`."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": total,
        "ignore_eos": True,
        **more,
    }
    if think is None:
        return {**body, "chat_template_kwargs": {"enable_thinking": False}}
    return {**body, **thinking(think)}
