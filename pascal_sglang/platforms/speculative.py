"""Speculative decoding on the reference CPU platform: plain PyTorch in the place of the Triton
kernels that SGLang launches for chains of drafts (`--speculative-eagle-topk 1`)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from pascal_sglang.older_sglang import install as install_older

# What SGLang's EAGLE worker serves; the draft models of the others are not carried.
ALGORITHMS = ("EAGLE", "EAGLE3", "STANDALONE")


def keep_overlap() -> None:
    """SGLang turns overlap off for its own CPU engine. Here the same code runs with and without."""
    from sglang.srt.arg_groups import speculative_hook

    speculative_hook._disable_overlap_schedule_for_cpu = lambda server_args: None


def install() -> None:
    """Put the functions of this file in the place of SGLang's, where they are called by name."""
    for module in _functions():
        importlib.import_module(module)
    install_older()  # For what has just been imported.
    for module, functions in _functions().items():
        found = sys.modules[module]
        for name, function in functions.items():
            if not hasattr(found, name):
                raise RuntimeError(f"{module} has no {name}")
            setattr(found, name, function)
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    MHATokenToKVPool._init_kv_copy_and_warmup = _move_natively
    DraftBackendFactory.create_decode_backend = _draft_steps
    DraftBackendFactory.create_draft_extend_backend = _draft_extend


def _functions() -> dict[str, dict[str, Callable[..., Any]]]:
    return {
        "sglang.srt.managers.overlap_utils": {"gather_spec_extras": gather_rows},
        "sglang.srt.mem_cache.allocation": {"assign_req_to_token_pool_func": write_rows},
        "sglang.srt.speculative.eagle_utils": {
            "build_tree_kernel_efficient_func": build_chain,
            "verify_tree_greedy_func": verify_greedy,
            "tree_speculative_sampling_target_only": verify_sampled,
            "top_k_renorm_prob": renormalized_top_k,
            "top_p_renorm_prob": renormalized_top_p,
        },
        "sglang.srt.speculative.eagle_worker_common": {
            "assign_draft_cache_locs_contiguous_func": draft_locations,
            "fill_bonus_tokens_func": last_accepted,
        },
        # Changed in older releases alone.
        "sglang.srt.speculative.eagle_worker_v2": {},
    }


def _move_natively(pool: Any) -> None:
    """Chains move no KV, so nothing is compiled for it."""
    pool._kv_copy_config = None
    pool.use_native_move_kv_cache = True


def _draft_steps(factory: Any) -> Any:
    from pascal_sglang.platforms.attention import ReferenceDraftSteps

    if factory.speculative_num_steps <= 1:
        return None
    steps = ReferenceDraftSteps(
        factory.draft_model_runner, factory.topk, factory.speculative_num_steps
    )
    for backend in steps.attn_backends:
        _stamp(backend)
    return steps


def _draft_extend(factory: Any) -> Any:
    from pascal_sglang.platforms.attention import ReferenceAttention

    return _stamp(ReferenceAttention(factory.draft_model_runner))


def _stamp(backend: Any) -> Any:
    """As SGLang's factory does: layers ask which backend serves them."""
    backend.prefill_attention_backend_str = "torch_native"
    backend.decode_attention_backend_str = "torch_native"
    return backend


def gather_rows(
    indices: torch.Tensor,
    topk_p_buf: torch.Tensor,
    topk_index_buf: torch.Tensor,
    output_tokens_buf: torch.Tensor,
    hidden_states_buf: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the requests at `indices` hand from step to step."""
    hidden = None if hidden_states_buf is None else hidden_states_buf[indices]
    return topk_p_buf[indices], topk_index_buf[indices], output_tokens_buf[indices], hidden


def write_rows(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write new KV entries, given one request after the other, into the requests' rows."""
    begin = 0
    for row, start, end in _spans(req_pool_indices, start_offset, end_offset):
        req_to_token[row, start:end] = out_cache_loc[begin : begin + end - start]
        begin += end - start


def read_rows(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """The KV entries from `start_offset` to `end_offset` of the requests' rows, one request after
    the other."""
    spans = _spans(req_pool_indices, start_offset, end_offset)
    return torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long()


def _spans(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return list(zip(*(tensor.tolist() for tensor in tensors), strict=True))


def draft_locations(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: torch.Tensor | None = None,
    mrope: torch.Tensor | None = None,
) -> None:
    """The KV entries that the steps of each request's draft write, into `out_cache_loc`."""
    columns = seq_lens.unsqueeze(1) + torch.arange(topk * num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices.unsqueeze(1), columns].flatten())


def last_accepted(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """The last token that a step gave each request, into `bonus_tokens`."""
    rows = torch.arange(batch_size) * accept_stride
    bonus_tokens.copy_(accept_tokens.flatten()[rows + accept_lens - 1])


def build_chain(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Fill in what a verification reads of a chain: token i comes after token i - 1 and sees those
    up to itself. The mask is of (tokens, KV and tokens) per request, one after the other, and is
    true of the KV already; links that there are not are -1."""
    if topk != 1 or tree_mask_mode != 0:
        raise NotImplementedError("--speculative-eagle-topk above 1")
    new = num_verify_tokens
    order = torch.arange(new)
    positions.copy_((seq_lens.unsqueeze(1) + order).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token[:, :-1] = order[1:]
    sees = order.unsqueeze(0) <= order.unsqueeze(1)
    begin = 0
    for length in seq_lens.tolist():
        end = begin + new * (length + new)
        tree_mask[begin:end].view(new, length + new)[:, length:] = sees
        begin = end


def verify_greedy(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept a chain's tokens up to the first that the target model would not have written.

    candidates, target_predict: (requests, tokens), the chain and what follows each of its tokens.
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    accept_token_num.copy_(right.long().cumprod(1).sum(1))
    predicts.copy_(target_predict.flatten())
    _accept(accept_index, accept_token_num, retrieve_index)
    return predicts, accept_index, accept_token_num


def verify_sampled(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
) -> None:
    """Accept each token of a chain with the target model's probability for it; where one is not
    accepted, draw another by the target model's probabilities of the others.

    target_probs: (requests, tokens, vocabulary). uniform_samples: (requests, tokens).
    """
    drafted = target_probs[:, :-1].gather(2, candidates[:, 1:].long().unsqueeze(2)).squeeze(2)
    luck = uniform_samples[:, :-1] <= drafted / threshold_acc
    right = luck | (drafted >= threshold_single)
    accept_token_num.copy_(right.long().cumprod(1).sum(1))
    for request, correct in enumerate(accept_token_num.tolist()):
        chain = predicts.view_as(candidates)[request]
        chain[:correct] = candidates[request, 1 : correct + 1]
        left = target_probs[request, correct].clone()
        if correct + 1 < candidates.shape[1]:
            left[candidates[request, correct + 1].long()] = 0.0
        sums = left.cumsum(0)
        drawn = uniform_samples_for_final_sampling[request] * sums[-1]
        chain[correct] = torch.searchsorted(sums, drawn, right=True).clamp(max=len(sums) - 1)
    _accept(accept_index, accept_token_num, retrive_index)


def _accept(
    accept_index: torch.Tensor, accept_token_num: torch.Tensor, retrieve_index: torch.Tensor
) -> None:
    """The numbers of the accepted tokens, the one before the draft included, into `accept_index`,
    which is -1 all over."""
    width = accept_index.shape[1]
    taken = torch.arange(width).unsqueeze(0) <= accept_token_num.unsqueeze(1)
    accept_index.copy_(torch.where(taken, retrieve_index[:, :width].to(accept_index.dtype), -1))


def renormalized_top_k(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """Probabilities of each row's `top_ks` likeliest tokens; the others' are 0."""
    ranked = probs.sort(dim=-1, descending=True).values
    last = top_ks.long().clamp(1, probs.shape[-1]).unsqueeze(1) - 1
    return _renormalized(probs.where(probs >= ranked.gather(1, last), 0.0))


def renormalized_top_p(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Probabilities of the fewest tokens of each row that make up `top_ps`; the others' are 0."""
    ranked, order = probs.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.zeros_like(probs, dtype=torch.bool)
    kept.scatter_(1, order, before < top_ps.unsqueeze(1))
    return _renormalized(probs.where(kept, 0.0))


def _renormalized(probs: torch.Tensor) -> torch.Tensor:
    return probs / probs.sum(-1, keepdim=True)
