"""Logit processors that end thinking after a budget, for the two demo models."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    ThinkingBudgetLogitProcessor,
)

from pascal_sglang.demo import smollm2, tiny


def _step(request: Any) -> int:
    """How many tokens the request has sampled so far.

    Counted in KV entries: overlap scheduling shows `output_ids` a token late.
    """
    return int(request.kv.kv_committed_len) - len(request.origin_input_ids)


class DemoThinkingBudget(ThinkingBudgetLogitProcessor):
    """SGLang's thinking budget for the demo model, which was never taught to think.

    Thinking closes after `custom_params["thinking_budget"]` tokens (None: no limit), or where the
    model would end its turn, and the answer has at least one token. SGLang's own processor looks at
    `output_ids` only and writes the end marker twice under overlap scheduling.
    """

    THINKING_START_TOKEN_ID = smollm2.THINK_ID
    THINKING_END_TOKEN_ID = smollm2.END_THINK_ID
    NEW_LINE_TOKEN_ID = smollm2.NEW_LINE_ID
    CLOSED_AT = "_closed_at"

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        for row, params in enumerate(custom_param_list or ()):
            request = params.get("__req__") if params else None
            # A prompt that ends in a closed block asks for no thinking.
            if request is None or smollm2.END_THINK_ID in request.origin_input_ids[-3:]:
                continue
            step, scores = _step(request), logits[row]
            ends = int(scores.argmax()) == smollm2.END_OF_TURN_ID
            scores[[smollm2.THINK_ID, smollm2.END_THINK_ID]] = -torch.inf
            # A marker sampled one step ago may not be in `output_ids` yet.
            just_closed = params.get(self.CLOSED_AT) == step - 1
            if smollm2.END_THINK_ID in request.output_ids and not just_closed:
                continue
            scores[smollm2.END_OF_TURN_ID] = -torch.inf
            budget = params.get("thinking_budget")
            spent = isinstance(budget, int) and 0 <= budget <= step
            if (ends or spent) and not just_closed:
                params[self.CLOSED_AT] = step
                scores[:] = -torch.inf
                scores[smollm2.END_THINK_ID] = 0.0
        return logits


class TinyThinkingBudget(CustomLogitProcessor):
    """Exactly `custom_params["thinking_budget"]` thinking tokens, then the end marker, for the tiny
    model.

    Constant work per request and step; SGLang's own copies every id so far, which at load costs
    more than the model.
    """

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        ends: list[int] = []
        goes_on: list[int] = []
        for row, params in enumerate(custom_param_list or ()):
            budget = params.get("thinking_budget") if params else None
            request = params.get("__req__") if params else None
            if isinstance(budget, int) and request is not None:
                (ends if _step(request) == budget else goes_on).append(row)
        # One launch for all requests, and two more for each whose thinking ends now: on a GPU a
        # launch for every request costs more than the model.
        if len(goes_on) + len(ends) == len(logits):
            logits[:, tiny.THINK_ID : tiny.END_THINK_ID + 1] = -torch.inf
        else:
            for row in goes_on:
                logits[row, tiny.THINK_ID : tiny.END_THINK_ID + 1] = -torch.inf
        for row in ends:
            logits[row] = -torch.inf
            logits[row, tiny.END_THINK_ID] = 0.0
        return logits


class TinyOwnLengths(CustomLogitProcessor):
    """Thinking and answer of the tiny model end by themselves, as its server sees it: after
    `custom_params["own_lengths"]` tokens, of each, which only this processor reads."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        for row, params in enumerate(custom_param_list or ()):
            request = params.get("__req__") if params else None
            if request is None:
                continue
            thinking, answer = params["own_lengths"]
            step = _step(request)
            if step in (thinking, thinking + answer):
                logits[row] = -torch.inf
                logits[row, tiny.END_THINK_ID if step == thinking else tiny.END_OF_TURN_ID] = 0.0
            else:
                logits[row, tiny.END_OF_TURN_ID : tiny.END_THINK_ID + 1] = -torch.inf
        return logits


class DummyThinkingBudget(TinyThinkingBudget):
    """The same for models with random weights and a vocabulary beyond the tokenizer's, of which
    they are to write letters only."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        logits[:, : tiny.LETTER_IDS[0]] = -torch.inf
        logits[:, tiny.LETTER_IDS[1] + 1 :] = -torch.inf
        return super().__call__(logits, custom_param_list)
