"""Logit processors that end thinking after a budget, for the two demo models."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    ThinkingBudgetLogitProcessor,
)

from pascal_sglang.demo import smollm2, tiny


class DemoThinkingBudget(ThinkingBudgetLogitProcessor):
    """SGLang's own thinking budget with the demo model's token ids.

    The model was never taught to think: where it would end its turn inside the thinking, it closes
    the thinking instead and goes on to answer.
    """

    THINKING_START_TOKEN_ID = smollm2.THINK_ID
    THINKING_END_TOKEN_ID = smollm2.END_THINK_ID
    NEW_LINE_TOKEN_ID = smollm2.NEW_LINE_ID

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]]
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        for row, params in enumerate(custom_param_list or ()):
            request = params.get("__req__") if params else None
            if request is None or smollm2.END_THINK_ID in request.output_ids:
                continue
            done = logits[row, smollm2.END_OF_TURN_ID].clone()
            logits[row, smollm2.END_OF_TURN_ID] = -torch.inf
            logits[row, smollm2.END_THINK_ID] = done
        return super().__call__(logits, custom_param_list)


class TinyThinkingBudget(CustomLogitProcessor):
    """`custom_params["thinking_budget"]` thinking tokens, then the end marker, for the tiny model.

    Constant work per request and step; SGLang's own copies every id so far, which at load costs
    more than the model. Under overlap scheduling a processor sees `output_ids` a token late, so
    thinking may run one token over, and a marker just forced must be given time to show.
    """

    FORCED_AT = "_forced_at"

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """`logits`: (batch, vocabulary), changed in place."""
        for row, params in enumerate(custom_param_list or ()):
            budget = params.get("thinking_budget") if params else None
            request = params.get("__req__") if params else None
            if not isinstance(budget, int) or request is None:
                continue
            if self._must_close(params, budget, request.output_ids):
                logits[row] = -torch.inf
                logits[row, tiny.END_THINK_ID] = 0.0
            else:
                logits[row, tiny.THINK_ID] = -torch.inf
                logits[row, tiny.END_THINK_ID] = -torch.inf
        return logits

    def _must_close(self, params: dict[str, Any], budget: int, output_ids: Any) -> bool:
        seen = len(output_ids)
        if seen < budget:
            return False
        forced_at = params.get(self.FORCED_AT)
        if forced_at is not None:
            window = output_ids[forced_at : forced_at + 2]
            if tiny.END_THINK_ID in window or seen < forced_at + 2:
                return False
        params[self.FORCED_AT] = seen
        return True
