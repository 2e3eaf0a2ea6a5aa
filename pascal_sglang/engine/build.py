"""Decides whether a scheduler is governed, and with which budget."""

from __future__ import annotations

import logging

import psutil
from sglang.srt.runtime_context import get_parallel, get_schedule

from pascal_sglang import support
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv import host_cache
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
    refused = support.at_most(support.Level.OBSERVE, support.POOLS)
    if (pool := support.first(refused, scheduler)) is not None:
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
    tokens, states, windows = agree(scheduler, *host_budget(copies, scheduler, config))
    copies.reserve(int(tokens))
    if copies.states is not None:
        copies.states.reserve(int(states))
    if copies.windows is not None:
        copies.windows.reserve(int(windows))
    if cache := host_cache.size_bytes(scheduler):
        logger.info(
            "pascal_sglang: each rank takes %.2f GiB of host memory for paused KV, "
            "besides %.2f GiB of the hierarchical cache",
            copies.reserved_bytes / 2**30,
            cache / 2**30,
        )
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
    return copies if copies.copies else PoolCopies(scheduler)


def host_budget(
    copies: HostCopies, scheduler: SchedulerProtocol, config: PascalConfig
) -> tuple[float, float, float]:
    """Tokens of paused KV that this rank may hold in host memory, recurrent states, and entries of
    sliding windows: as many of each as the device has, times the same factor."""
    parallel = get_parallel()
    if not copies.copies:
        return 0.0, 0.0, 0.0
    tp_size: int = parallel.tp_size
    tokens: int = scheduler.max_total_num_tokens
    states: int = 0
    windows: int = 0
    device: int = tokens * copies.bytes_per_token
    if copies.states is not None:
        states = scheduler.req_to_token_pool.mamba_allocator.size
        device += states * copies.states.bytes_per_entry
    if copies.windows is not None:
        windows = scheduler.token_to_kv_pool_allocator.size_swa
        device += windows * copies.windows.bytes_per_entry
    if config.host_kv_gb is not None:
        factor = config.host_kv_gb * 2**30 / tp_size / device
    else:
        ranks: int = parallel.dp_size * tp_size
        available: int = psutil.virtual_memory().available
        factor = min(2.0, available / 4 / ranks / device)
    return factor * tokens, factor * states, factor * windows
