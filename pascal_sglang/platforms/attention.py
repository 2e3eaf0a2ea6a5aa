"""Attention of the reference CPU platform, in plain PyTorch, for every kind of layer that SGLang's
`torch_native` backend leaves out: sinks, logit caps, sliding-window pools, MLA and speculation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn.functional import scaled_dot_product_attention

# Queries whose scores are in memory at a time where PyTorch has no kernel that spares them.
BLOCK = 256


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of one request's new tokens; the result has the shape (T, Hq, Dv).

    q: (T, Hq, D). k: (S, Hk, D) and v: (S, Hk, Dv), Hq a multiple of Hk. visible: (T, S), which
    keys a query sees, at least one; None for all. sinks: (Hq,), the logit of a key without a value.
    logit_cap: the largest absolute logit, by tanh; 0 for none.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if sinks is None and not logit_cap:
        out = scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=visible,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(0).transpose(0, 1)
    masks = [None] * -(-len(q) // BLOCK) if visible is None else visible.split(BLOCK)
    parts = [
        _attend_by_scores(some, k, v, seen, scale, sinks, logit_cap)
        for some, seen in zip(q.split(BLOCK), masks, strict=True)
    ]
    return torch.cat(parts)


def _attend_by_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    logit_cap: float,
) -> torch.Tensor:
    tokens, heads, _ = q.shape
    grouped = q.view(tokens, k.shape[1], heads // k.shape[1], -1)
    scores = torch.einsum("tkgd,skd->kgts", grouped, k) * scale
    if logit_cap:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(scores.dtype).view(k.shape[1], -1, 1, 1).expand(-1, -1, tokens, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return torch.einsum("kgts,skd->tkgd", weights, v).reshape(tokens, heads, -1)


class ReferenceAttention(TorchNativeAttnBackend):
    """Reads the KV pool request by request.

    draft_step: the backend is for that step of a draft after its first, counted from 0: as many
    tokens and one stand in the pool that the batch's lengths do not count.
    """

    def __init__(self, runner: Any, draft_step: int | None = None) -> None:
        super().__init__(runner)
        self._drafted = 0 if draft_step is None else draft_step + 1

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        return 1

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: int | None
    ) -> None:
        """Nothing is prepared before the draft."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        encodes = layer.attn_type is AttentionType.ENCODER_ONLY
        if layer.is_cross_attention or encodes:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, sinks)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer.is_cross_attention:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, sinks)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer.xai_temperature_len > 0 or layer.logit_capping_method != "tanh":
            raise NotImplementedError("attention with a temperature by length")
        pool, rows = self.token_to_kv_pool, self.req_to_token_pool.req_to_token
        windowed = self.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]
        if save_kv_cache and k is not None and v is not None:
            written = forward_batch.out_cache_loc
            # Not by what is prepared for the batch: a draft writes elsewhere in each step.
            swa = pool.translate_loc_from_full_to_swa(written) if windowed else None
            pool.set_kv_buffer(layer, KVWriteLoc(written, swa), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty((len(q), layer.tp_q_head_num, layer.v_head_dim))
        window = layer.sliding_window_size
        begin = 0
        requests = forward_batch.req_pool_indices.tolist()
        spans = self._spans(forward_batch, len(q))
        for row, (length, new, tree) in zip(requests, spans, strict=True):
            # What no query sees may be evicted.
            first = max(0, length - new - window) if window > -1 else 0
            where = rows[row, first:length]
            if windowed:
                where = pool.translate_loc_from_full_to_swa(where)
            here = torch.arange(length - new, length).unsqueeze(1)
            there = torch.arange(first, length).unsqueeze(0)
            visible = there <= here if tree is None else tree[:, first:]
            if window > -1:
                visible = visible & (there >= here - window)
            out[begin : begin + new] = attend(
                q[begin : begin + new],
                keys[where],
                values[where],
                None if new == 1 and tree is None else visible,
                scale=layer.scaling,
                sinks=sinks,
                logit_cap=layer.logit_cap,
            )
            begin += new
        return out.view(len(q), -1)

    def _spans(
        self, forward_batch: ForwardBatch, tokens: int
    ) -> Iterator[tuple[int, int, torch.Tensor | None]]:
        """Of each request: how many tokens its KV has in this step, how many of them are new, and
        the mask of a draft that is a tree, of shape (new, KV)."""
        mode, lengths = forward_batch.forward_mode, forward_batch.seq_lens.tolist()
        if mode.is_target_verify():
            yield from _verified(forward_batch.spec_info, lengths)
        elif mode.is_decode():
            if tokens != len(lengths):
                raise NotImplementedError("--speculative-eagle-topk above 1")
            yield from ((length + self._drafted, 1, None) for length in lengths)
        else:
            fresh = forward_batch.extend_seq_lens.tolist()
            yield from ((length, new, None) for length, new in zip(lengths, fresh, strict=True))


def _verified(spec: Any, lengths: list[int]) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """The spans of drafts of `spec.draft_token_num` tokens, which the lengths do not count."""
    new, begin = spec.draft_token_num, 0
    for length in lengths:
        whole = length + new
        tree = None
        if spec.custom_mask is not None:
            tree = spec.custom_mask[begin : begin + new * whole].view(new, whole).bool()
            begin += new * whole
        yield whole, new, tree


class ReferenceDraftSteps:
    """The steps of a draft after its first, each with a backend of its own, for chains alone."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, topk: int, steps: int) -> None:
        if topk != 1:
            raise NotImplementedError("--speculative-eagle-topk above 1")
        self.attn_backends = [ReferenceAttention(runner, step) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def create(runner: Any) -> ReferenceAttention:
    """The backend of a model runner. Loaded here, not with the platform: SGLang's model runner asks
    for the platform while it is imported itself."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        _dispatch_mla_subtype,
    )

    # What SGLang compiles on its own would take a C++ compiler and half a minute. Torch keeps this
    # for each thread: it is said in the one that runs the model.
    torch._dynamo.config.disable = True
    # Else a prefill of MLA hands keys over that the pool does not hold, without its prefix.
    for name in ("torch_native", "triton"):
        AttentionBackendRegistry.register(name, _dispatch_mla_subtype)
    return ReferenceAttention(runner)
