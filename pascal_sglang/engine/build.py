"""Decides whether a scheduler is governed, and with which budget."""

from __future__ import annotations

import logging

import psutil
from sglang.srt.runtime_context import get_parallel, get_schedule

from pascal_sglang import support
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.drafts import drafts
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.pool import measure_costs
from pascal_sglang.engine.kv.pool_copies import PoolCopies
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.engine.priorities import take_over
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import agree
from pascal_sglang.policy.kv_tier import Costs

logger = logging.getLogger(__name__)


def build_executor(scheduler: SchedulerProtocol, config: PascalConfig) -> PlanExecutor | None:
    """The executor of a scheduler whose pools exist; None under `fcfs` and for embedding models.

    Raises: RuntimeError for KV pools that the engine does not carry.
    """
    if not config.record.schedules or not scheduler.is_generation:
        return None
    if (pool := support.first(support.POOLS, scheduler)) is not None:
        raise RuntimeError(
            f"policy {config.policy} does not work with {pool} yet; use --pascal-policy fcfs"
        )
    if get_schedule().prefill_decode_interval is None:
        # SGLang prefills first: without this, endless new prompts would keep requests from
        # decoding. A prefill and a decode step take turns.
        scheduler.prefill_decode_interval = 1
    if get_parallel().attn_tp_rank == 0 and (
        flag := support.first(support.REPLACED, scheduler.server_args)
    ):
        logger.warning(
            "pascal_sglang: %s has no effect under policy %s, which has an order of its own",
            flag,
            config.policy,
        )
    copies = host_copies_of(scheduler)
    budget = int(agree(scheduler, host_budget_tokens(copies, scheduler, config)))
    copies.reserve(budget)
    measured = measure_costs(scheduler, copies)
    costs = Costs(*agree(scheduler, measured.copy_s, measured.copy_token_s))
    if measured.launch_s is not None:
        costs.launch_s = agree(scheduler, measured.launch_s)
    if not copies.copies:
        pool = type(scheduler.token_to_kv_pool_allocator.get_kvcache()).__name__
        logger.warning("pascal_sglang: KV in this %s is not copied; pauses recompute it", pool)
    policy = take_over(scheduler, config.record)
    return PlanExecutor(scheduler, config, policy, copies, costs)


def host_copies_of(scheduler: SchedulerProtocol) -> HostCopies:
    """The host memory for a scheduler's KV: in our own form, or in the pool's where that is all we
    know of it."""
    copies = HostCopies(scheduler)
    # The pool's own form does not have the KV of a draft model.
    return copies if copies.copies or drafts(scheduler) else PoolCopies(scheduler)


def host_budget_tokens(
    copies: HostCopies, scheduler: SchedulerProtocol, config: PascalConfig
) -> float:
    """Tokens of paused KV that this rank may hold in host memory."""
    parallel = get_parallel()
    if not copies.copies:
        return 0.0
    per_token: int = copies.bytes_per_token
    tp_size: int = parallel.tp_size
    if config.host_kv_gb is not None:
        return config.host_kv_gb * 2**30 / tp_size / per_token
    ranks: int = parallel.dp_size * tp_size
    available: int = psutil.virtual_memory().available
    tokens: int = scheduler.max_total_num_tokens
    return min(2.0 * tokens, available / 4 / ranks / per_token)
