"""Decides whether a scheduler is governed, and with which budget."""

from __future__ import annotations

from typing import Any

import psutil
from sglang.srt.runtime_context import get_parallel, get_schedule

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.copies import Copies
from pascal_sglang.engine.governor import Governor
from pascal_sglang.engine.pool import measure_costs
from pascal_sglang.engine.ranks import agree
from pascal_sglang.policy.rung import Costs


def build_governor(scheduler: Any, config: PascalConfig) -> Governor | None:
    """The governor of a scheduler whose pools exist; None under `fcfs` and for embedding models.

    Raises: RuntimeError for KV pools that the ladder does not carry.
    """
    if config.policy == "fcfs" or not scheduler.is_generation:
        return None
    carried = not (scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm or scheduler.attn_dp_enabled)
    if not carried:
        raise RuntimeError(
            f"policy {config.policy} does not work with hybrid KV pools or DP attention yet; "
            "use --pascal-policy fcfs"
        )
    if get_schedule().prefill_decode_interval is None:
        # SGLang prefills first: without this, endless new prompts would keep thinkers from
        # decoding. A prefill and a decode step take turns.
        scheduler.prefill_decode_interval = 1
    copies = Copies(scheduler)
    measured = measure_costs(scheduler, copies)
    budget, copy_s, copy_token_s = agree(
        scheduler, host_budget_tokens(scheduler, config), measured.copy_s, measured.copy_token_s
    )
    return Governor(scheduler, config, copies, int(budget), Costs(copy_s, copy_token_s))


def kv_bytes_per_token(scheduler: Any) -> float:
    """Bytes of KV per token in this rank's device pool."""
    pool_bytes = scheduler.token_to_kv_pool_allocator.get_kvcache().mem_usage * 2**30
    return float(pool_bytes) / max(1, scheduler.max_total_num_tokens)


def host_budget_tokens(scheduler: Any, config: PascalConfig) -> float:
    """Tokens of paused KV that this rank may hold in host memory."""
    parallel = get_parallel()
    per_token = max(kv_bytes_per_token(scheduler), 1e-9)
    if config.host_kv_gb is not None:
        return config.host_kv_gb * 2**30 / parallel.tp_size / per_token
    ranks = parallel.dp_size * parallel.tp_size
    available = psutil.virtual_memory().available / 4 / ranks
    return min(4.0 * scheduler.max_total_num_tokens, available / per_token)
