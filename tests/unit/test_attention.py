"""Attention of the reference platform against the sums that it stands for."""

import math

import pytest
import torch

from pascal_sglang.platforms import attention


def by_hand(q, k, v, visible, scale, sinks, logit_cap):
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = [s for s in range(k.shape[0]) if visible is None or visible[t, s]]
            logits = [scale * float(q[t, h] @ k[s, h // group]) for s in seen]
            if logit_cap:
                logits = [logit_cap * math.tanh(x / logit_cap) for x in logits]
            total = sum(math.exp(x) for x in logits)
            if sinks is not None:
                total += math.exp(float(sinks[h]))
            for s, x in zip(seen, logits, strict=True):
                out[t, h] += math.exp(x) / total * v[s, h // group]
    return out


@pytest.mark.parametrize("logit_cap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("seen", ["all", "causal", "window"])
@pytest.mark.parametrize(("heads", "width"), [(4, 8), (2, 8), (1, 6)])
def test_attention(heads, width, seen, sinks, logit_cap, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    torch.manual_seed(0)
    new, whole = 5, 9
    q, k = torch.randn(new, 4, 8), torch.randn(whole, heads, 8)
    v = torch.randn(whole, heads, width)
    here = torch.arange(whole - new, whole).unsqueeze(1)
    there = torch.arange(whole).unsqueeze(0)
    visible = None
    if seen != "all":
        visible = there <= here
    if seen == "window":
        visible = visible & (there >= here - 3)
    found = attention.attend(q, k, v, visible, scale=0.4, sinks=sinks, logit_cap=logit_cap)
    torch.testing.assert_close(found, by_hand(q, k, v, visible, 0.4, sinks, logit_cap))
