"""What becomes of every field of SGLang's `Req` and of its parts when a request changes instance.

A field is *carried* in the snapshot, *rebuilt* on the target instance for the reason given, or
*refused*: a request in which it is set stays where it is. A unit test compares these tables with
the installed SGLang, so a field that a new release adds is decided on before it is lost.
"""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

from pascal_sglang.engine.migration.trace_link import travels

# Arguments of `Req` that are plain values and attributes of the same name.
GIVEN = (
    "rid",
    "return_logprob",
    "stream",
    "custom_logit_processor",
    "require_reasoning",
    "priority",
    "extra_key",
    "cache_salt",
    "routing_key",
    "http_worker_ipc",
    "return_flat_raw_top_logprobs",
    "sampling_logprobs_mode",
)
# Attributes of `Req` that are plain values, set on the new request as they are.
PLAIN = (
    "_is_reasoning_over",
    "reasoning_tokens",
    "_think_end_match_len",
    "_think_start_match_len",
    "surr_offset",
    "read_offset",
    "decoded_text",
    "send_token_offset",
    "send_decode_id_offset",
    "send_output_token_logprobs_offset",
    "logprob_start_len",
    "temp_scaled_logprobs",
    "top_p_normalized_logprobs",
    "input_logprob_sent",
    "is_retracted",
    "retracted_stain",
    "retraction_count",
    "prefill_attempt_count",
    "cached_tokens",
    "already_computed",
    "cached_tokens_device",
    "cached_tokens_host",
    "cached_tokens_storage",
    "_cache_breakdown_computed",
    "arrival_processed_tokens",
    "skip_radix_cache_insert",
    "has_log_time_stats",
    "spec_verify_ct",
    "spec_num_correct_drafts",
    "spec_correct_drafts_histogram",
)
# Attributes of `Req` that the snapshot carries in a form of its own.
SHAPED = (
    "origin_input_ids",
    "origin_input_ids_unpadded",
    "output_ids",
    "surr_and_decode_ids",
    "cur_decode_ids_len",
    "sampling_params",
    "logprob",
    "time_stats",
)

# Of `Req.logprob`: the arguments; what was computed of the prompt, which SGLang collects in the
# first prefill alone and tells with the first output; what was computed of each output token.
LOGPROB_GIVEN = ("top_logprobs_num", "token_ids_logprob")
PROMPT_LOGPROBS = (
    "input_token_logprobs_val",
    "input_token_logprobs_idx",
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "input_token_ids_logprobs_val",
    "input_token_ids_logprobs_idx",
)
OUTPUT_LOGPROBS = (
    "output_token_logprobs_val",
    "output_token_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx",
)

TIMES = tuple(
    name
    for name, field in SchedulerReqTimeStats.__dataclass_fields__.items()
    if field.type in ("float", "int", "Optional[float]") and name != "diff_realtime_monotonic"
)

# Reason -> fields that the target instance makes anew.
REBUILT: dict[str, tuple[str, ...]] = {
    "belongs to the instance": ("tokenizer", "eos_token_ids", "vocab_size", "metrics_collector"),
    "made of the token ids on first use": ("_think_end_matcher",),
    "says where the KV is, which `PausedRequests.adopt` decides": (
        "kv",
        "prefix_len",
        "extend_end",
        "full_untruncated_fill_ids",
        "last_node",
        "last_host_node",
        "best_match_node",
        "lock",
        "cache_request_handle",
    ),
    "found again by every prefill": (
        "num_matched_prefix_tokens",
        "host_hit_length",
        "swa_host_hit_length",
        "mamba_host_hit_length",
        "mamba_branching_seqlen",
        "swa_branching_seqlen",
        "host_loaded_length",
        "host_hit_is_storage",
        "storage_hit_length",
        "storage_hit_start",
        "storage_prefetch_last_match_len",
        "storage_prefetch_retry_attempts",
        "staged_prefetch_plan",
        "kv_rotation_base",
        "extend_batch_idx",
    ),
    "lasts for one prefill, and no request moves in one": (
        "inflight_middle_chunks",
        "input_token_logprobs",
        "temp_input_top_logprobs_val",
        "temp_input_top_logprobs_idx",
        "temp_input_token_ids_logprobs_val",
        "temp_input_token_ids_logprobs_idx",
    ),
    "counts steps since its KV is here": ("decode_batch_idx",),
    "says whether its end leaves a state to the prefix cache here": ("mamba_lazy_checkpoint",),
    "was read when the request was sent to its first instance": ("routed_dp_rank",),
    "made anew, and given the output so far (`grammar`)": (
        "grammar",
        "grammar_key",
        "grammar_wait_ct",
    ),
    "follows from `return_hidden_states`, with which a request stays": (
        "return_hidden_states_mode",
    ),
    # SGLang gives it to every request.
    "is read with `bootstrap_host`, with which a request stays": ("bootstrap_port",),
    "is read with `return_routed_experts`, with which a request stays": (
        "routed_experts_start_len",
    ),
}
# Reason -> fields of `Req`; a request in which one of them is set stays.
REFUSED: dict[str, tuple[str, ...]] = {
    "its end": (
        "to_finish",
        "finished_reason",
        "finished_len",
        "finished_output",
        "discard_output_reason",
    ),
    "beam search": ("beam_group",),
    "a session": ("session", "session_id", "session_generation", "_session_mm_items"),
    "multimodal inputs": (
        "multimodal_inputs",
        "mm_image_tokens",
        "mm_audio_tokens",
        "mm_video_tokens",
        "mm_token_counts_ready",
    ),
    "input embeddings": ("input_embeds",),
    "embedding overrides": ("positional_embed_overrides",),
    "token types": ("token_type_ids",),
    "a LoRA adapter": ("lora_id",),
    "hidden states returned": ("return_hidden_states", "hidden_states", "hidden_states_tensor"),
    "routed experts returned": (
        "return_routed_experts",
        "routed_experts",
        "return_indexer_topk",
        "indexer_topk",
    ),
    "a sampling mask returned": ("return_sampling_mask", "sampling_mask_rows"),
    "customized output": ("customized_info",),
    "a change of weights": ("weight_version_events",),
    "cache hints": ("kv_hints",),
    "an embedding returned": (
        "embedding",
        "dimensions",
        "return_pooled_hidden_states",
        "pooled_hidden_state",
    ),
    "scores": ("multi_item_delimiter_indices", "token_indices_to_pool", "decision_layout"),
    "speculation of another kind": (
        "spec_num_block_accept_tokens",
        "spec_num_cap_tokens",
        "spec_cap_lens_histogram",
        "output_topk_p",
        "output_topk_index",
        "output_dsa_topk_indices",
    ),
    "diffusion": (
        "dllm_config",
        "dllm_phase",
        "dllm_incomplete_ids",
        "dllm_algo_state",
        "dllm_block_offset",
        "dllm_has_literal_mask",
        "dllm_initialized",
    ),
    "prefill on another server": (
        "bootstrap_host",
        "bootstrap_room",
        "disagg_kv_sender",
        "disagg_prefill_dp_rank",
        "disagg_decode_prefix_len",
        "start_send_idx",
        "tmp_end_idx",
        "early_send_prefix_end",
        "metadata_buffer_index",
        "expected_kv_checksum",
        "pending_bootstrap",
        "pd_rebootstrap_forced_output_id",
    ),
    "pipeline parallelism": ("retraction_mb_id",),
    "sparse KV": ("hisparse_staging",),
}

# The same for the parts of `Req`.
KV_REBUILT = (
    "req_pool_idx",
    "cache_protected_len",
    "cache_inserted_len",
    "kv_committed_len",
    "kv_allocated_len",
    # How far windows have slid: the target is told with the KV.
    "component_evicted_seqlens",
    # The slot of its recurrent state, and those that track it for the prefix cache.
    "mamba_pool_idx",
    "mamba_ping_pong_track_buffer",
    "mamba_ping_pong_empty",
    "mamba_next_track_idx",
    "mamba_last_track_idx",
    "mamba_last_track_seqlen",
    "mamba_prev_track_seqlen",
    "mamba_untracked_decode_batch_idx",
    "mamba_cow_src_index",
    "mamba_needs_clear",
)
KV_REFUSED: dict[str, tuple[str, ...]] = {
    "a window that its prompt does not leave": ("swa_evict_floor",),
    "a backup of its KV": ("retraction_backup",),
}
LOGPROB_REFUSED: dict[str, tuple[str, ...]] = {
    "raw prompt log probabilities": (
        "input_top_logprobs_val_flat",
        "input_top_logprobs_idx_flat",
        "input_top_logprobs_flat_null_prefix",
    ),
}
TIMES_REBUILT: dict[str, tuple[str, ...]] = {
    "belongs to the instance": ("enable_metrics", "metrics_collector", "disagg_mode"),
    "of the clocks of two machines": ("diff_realtime_monotonic",),
    "polls before the first prefill": ("_storage_prefetch_wait", "_storage_staging_wait"),
    "set where times arrive from another process": ("has_timing_data",),
    "of `trace_link`": ("trace_ctx",),
}


def is_set(value: Any) -> bool:
    """Whether a field holds anything else than what SGLang starts it with."""
    if isinstance(value, bool) or value is None:
        return value is True
    if isinstance(value, int):
        return value not in (0, -1)
    if isinstance(value, str | list | tuple | dict | set | array):
        return len(value) > 0
    return True


def refused_by(req: Req) -> str | None:
    """The first reason in the tables for which the request stays; None without one."""
    parts = [(req, REFUSED), (req.kv, KV_REFUSED)]
    if not req.input_logprob_sent:
        parts.append((req.logprob, LOGPROB_REFUSED))
    for part, refused in parts:
        for reason, names in refused.items():
            if any(is_set(getattr(part, name)) for name in names):
                return reason
    return None if travels(req) else "asynchronous tracing"
