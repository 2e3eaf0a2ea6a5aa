"""Recurrent layers (GDN: Qwen3-Next, Qwen3.5) in plain PyTorch, in the place of SGLang's kernels.

Each function here takes the arguments of the Triton kernel that it replaces. A state is updated
token by token in float32, exactly as the layer is defined. `install` puts the functions into the
modules that define the kernels, before the modules that use them are imported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

# Tokens between two states that a prefill hands out (`fla.index.CHUNK_SIZE` of the kernels).
CHUNK = 64


def _activated(x: torch.Tensor, activation: bool | str | None) -> torch.Tensor:
    if activation in (None, False):
        return x
    return torch.sigmoid(x) if activation == "sigmoid" else functional.silu(x)


def _gates(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithm of the decay, and the rate of writing."""
    g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of tokens, shapes (1, tokens, heads)."""
    g, rate = _gates(A_log, a, b, dt_bias)
    return g.unsqueeze(0), rate.unsqueeze(0)


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    state: torch.Tensor,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """One sequence of tokens: q, k (tokens, heads, K); v (tokens, value heads, V); g, beta (tokens,
    value heads); state (value heads, V, K). Returns the outputs like v, the state after the last
    token, and the states before each chunk."""
    q, k, v = q.float(), k.float(), v.float()
    if normalize:
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    group = v.shape[1] // q.shape[1]
    q, k = (scale * q).repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    # A copy: the caller writes the last state where the first one was.
    decay, state = g.float().exp(), state.float().clone()
    out, before = torch.empty_like(v), []
    for t in range(len(q)):
        if t % CHUNK == 0:
            before.append(state)
        state = state * decay[t].view(-1, 1, 1)
        read = (state * k[t].unsqueeze(1)).sum(-1)
        change = (v[t] - read) * beta[t].unsqueeze(-1)
        state = state + change.unsqueeze(-1) * k[t].unsqueeze(1)
        out[t] = (state * q[t].unsqueeze(1)).sum(-1)
    return out, state, before


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    *,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Prefill: sequences one after the other in tensors of shape (1, tokens, heads, ...). Returns
    the outputs, and the states before each chunk of each sequence, shape (1, chunks, ...)."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    out, states = torch.empty_like(v), []
    slots, edges = initial_state_indices.tolist(), cu_seqlens.tolist()
    for slot, (begin, end) in zip(slots, pairwise(edges), strict=True):
        part = [x[0, begin:end] for x in (q, k, v, g, beta)]
        o, state, before = _delta_rule(
            *part, scale=scale, state=initial_state[slot], normalize=use_qk_l2norm_in_kernel
        )
        out[0, begin:end] = o.to(v.dtype)
        states += before
        if inplace_update:
            initial_state[slot] = state.to(initial_state.dtype)
    kept = torch.stack(states) if states else initial_state[:0]
    return out, None, kept.to(q.dtype).unsqueeze(0)


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    states: torch.Tensor,
    slots: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    """One token of each sequence; shapes as in `_delta_rule`, with sequences for tokens."""
    out = torch.zeros_like(v)
    g, beta = gates
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        one = [x[i : i + 1] for x in (q, k, v, g, beta)]
        o, state, _ = _delta_rule(*one, scale=scale, state=states[slot], normalize=normalize)
        out[i] = o[0].to(v.dtype)
        states[slot] = state.to(states.dtype)
    return out


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode: one token of each sequence; `mixed_qkv` has the heads of q, k and v in a row."""
    heads, v_dim, k_dim = initial_state.shape[1:]
    width = heads * v_dim
    rest = (mixed_qkv.shape[1] - width) // 2
    q, k, v = mixed_qkv.split([rest, rest, width], -1)
    out[:, 0] = _decode(
        q.unflatten(-1, (-1, k_dim)),
        k.unflatten(-1, (-1, k_dim)),
        v.unflatten(-1, (-1, v_dim)),
        _gates(A_log, a, b, dt_bias),
        scale,
        initial_state,
        ssm_state_indices,
        use_qk_l2norm_in_kernel,
    )
    return out, initial_state


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    activation: str | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """Prefill: sequences one after the other, x of shape (channels, tokens)."""
    out, past, edges = torch.empty_like(x), weight.shape[1] - 1, query_start_loc.tolist()
    goes_on = has_initial_state.tolist()
    for i, (begin, end) in enumerate(pairwise(edges)):
        kept = conv_states[int(cache_indices[i])][:, -past:]
        before = kept.to(x.dtype) if goes_on[i] else x.new_zeros(len(x), past)
        both = torch.cat([before, x[:, begin:end]], 1)
        y = functional.conv1d(both.unsqueeze(0), weight.unsqueeze(1), bias, groups=len(x))[0]
        out[:, begin:end] = _activated(y, activation)
        kept.copy_(both[:, -past:])
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: bool | str | None = None,
    *,
    conv_state_indices: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Decode: one token of each sequence, x of shape (sequences, channels)."""
    out, past = torch.empty_like(x), weight.shape[1] - 1
    for i, slot in enumerate(conv_state_indices.tolist()):
        if slot < 0:
            continue
        kept = conv_state[slot][:, -past:]
        both = torch.cat([kept.to(x.dtype), x[i].unsqueeze(1)], 1)
        y = (both * weight).sum(1)
        out[i] = _activated(y if bias is None else y + bias, activation)
        kept.copy_(both[:, 1:])
    return out


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections that stand head by head (Qwen3-Next), sorted into `qkv`, z, b and a."""
    group = num_heads_v // num_heads_qk
    sizes = [head_qk, head_qk, group * head_v, group * head_v]
    parts = mixed_qkvz.unflatten(-1, (num_heads_qk, -1)).split(sizes, -1)
    q, k, v, z = (part.flatten(1) for part in parts)
    b, a = (x.flatten(1) for x in mixed_ba.unflatten(-1, (num_heads_qk, -1)).split(group, -1))
    return torch.cat([q, k, v], -1), z.unflatten(-1, (num_heads_v, head_v)), b, a


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for projections that stand kind by kind (Qwen3.5)."""
    width = num_heads_v * head_v
    qkv, z = mixed_qkvz.split([mixed_qkvz.shape[-1] - width, width], -1)
    b, a = mixed_ba.chunk(2, -1)
    return (
        qkv.contiguous(),
        z.unflatten(-1, (num_heads_v, head_v)).contiguous(),
        b.contiguous(),
        a.contiguous(),
    )


def rms_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A norm of each head's output, times the activated gate."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return (y * _activated(g.float(), activation)).to(x.dtype)


def _launch_fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """Write the shared expert's output times its gate to `output`, or add it to what is there."""
    gated = torch.sigmoid(hidden_states @ gate_weight).unsqueeze(-1) * shared_output
    output.copy_(output + gated if do_add else gated)


def track_mamba_states_if_needed(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy the states of the sequences that are asked for to slots that the prefix cache may take.
    The first dimension is the slot."""
    asked = mamba_track_mask[:batch_size] & (mamba_track_indices[:batch_size] >= 0)
    here, there = cache_indices[:batch_size][asked], mamba_track_indices[:batch_size][asked]
    for states in (conv_states, ssm_states):
        states[there] = states[here]


def track_mamba_states_all_layers(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """The same where the first dimension is the layer."""
    track_mamba_states_if_needed(
        conv_states_pool.transpose(0, 1),
        ssm_states_pool.transpose(0, 1),
        cache_indices,
        mamba_track_mask,
        mamba_track_indices,
        batch_size,
    )


def _not_pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Memory that no other device copies from stays as it is."""
    return tensor


def install() -> None:
    """Have SGLang's models find the functions above where the kernels are defined.

    Models ask for the current device of "the" device module; it is the CPU's here, also where
    PyTorch was built for CUDA.
    """
    from sglang.kernels.ops.attention import triton_gdn_fused_proj
    from sglang.kernels.ops.attention.fla import chunk, fused_norm_gate, fused_recurrent
    from sglang.kernels.ops.attention.linear import fused_gdn_gating as gating
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.kernels.ops.mamba import causal_conv1d_triton, mamba_state_scatter_triton

    chunk.chunk_gated_delta_rule = chunk_gated_delta_rule
    fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode = (
        fused_recurrent_gated_delta_rule_packed_decode
    )
    gating.fused_gdn_gating = fused_gdn_gating
    causal_conv1d_triton.causal_conv1d_fn = causal_conv1d_fn
    causal_conv1d_triton.causal_conv1d_update = causal_conv1d_update
    mamba_state_scatter_triton.track_mamba_states_if_needed = track_mamba_states_if_needed
    mamba_state_scatter_triton.track_mamba_states_all_layers = track_mamba_states_all_layers
    triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat = fused_qkvzba_split_reshape_cat
    triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous = (
        fused_qkvzba_split_reshape_cat_contiguous
    )
    fused_norm_gate.rms_norm_gated = rms_norm_gated
    # Where the function that models import looks it up: they may have imported it already.
    elementwise._launch_fused_gate_sigmoid_mul = _launch_fused_gate_sigmoid_mul
    of_device = torch.get_device_module
    torch.get_device_module = lambda device=None: of_device("cpu" if device is None else device)
    torch.Tensor.pin_memory = _not_pinned
