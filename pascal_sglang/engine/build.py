"""Decides whether a scheduler is governed, at which level, and with which budget."""

from __future__ import annotations

import logging
import os

from sglang.srt.managers import schedule_policy
from sglang.srt.runtime_context import (
    get_memory,
    get_observability,
    get_parallel,
    get_schedule,
    get_serving,
)

from pascal_sglang import scheduling_flags
from pascal_sglang.cluster.decision_file import DecisionFile
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.forecasts import Forecasts
from pascal_sglang.engine.host_memory import host_memory
from pascal_sglang.engine.kv import host_cache
from pascal_sglang.engine.kv.drafts import drafts
from pascal_sglang.engine.kv.host_copies import EntryCopies, HostCopies
from pascal_sglang.engine.kv.pool import measure_costs
from pascal_sglang.engine.kv.pool_copies import PoolCopies
from pascal_sglang.engine.kv.tool_kv import ToolKV
from pascal_sglang.engine.migration.build import receive_bytes
from pascal_sglang.engine.pipeline import pipeline_of
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.engine.priorities import take_over
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tool_calls import ToolCalls
from pascal_sglang.engine.tp_ranks import agree
from pascal_sglang.instances import instance_count, own_instance, speaks
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.support import COPIES, POOLS, TOOL_KV, Level, Support, first

logger = logging.getLogger(__name__)

CLIP_ENV = "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"
# Tokens that SGLang's prefill adder keeps for what a request may still write, where a plan decides.
PLANNED_TOKENS = 4


def build_executor(
    scheduler: SchedulerProtocol, config: PascalConfig, support: Support
) -> tuple[PlanExecutor | None, Support]:
    """The executor of a scheduler whose pools exist, None at the level OBSERVE; and the level.

    support: what the server's arguments leave.
    """
    support = support.under(POOLS, scheduler)
    if support.level is Level.OBSERVE:
        return None, support
    asked = scheduler.server_args.prefill_decode_interval
    # What is in effect is never None: where nothing is asked for, SGLang and some models say it.
    if asked is None and not get_schedule().prefill_decode_interval:
        # SGLang prefills first: without this, endless new prompts would keep requests from
        # decoding. A prefill and a decode step take turns.
        scheduler.prefill_decode_interval = 1
    if speaks():
        for name, instead in scheduling_flags.overridden(scheduler.server_args, support.level):
            logger.warning(
                "pascal_sglang: %s has no effect under policy %s: %s", name, config.policy, instead
            )
    copies = host_copies_of(scheduler, kept=support.level >= Level.PAUSE)
    if support.level >= Level.PAUSE:
        support = support.under(COPIES, copies)
    if support.level >= Level.RECOMPUTE and CLIP_ENV not in os.environ:
        # The plan says what fits; the adder is not to reserve more than it.
        schedule_policy.CLIP_MAX_NEW_TOKENS = PLANNED_TOKENS
    beside = receive_bytes(scheduler, copies, config, support)
    budget = host_budget(copies, scheduler, config, beside)
    tokens, states, windows = agree(scheduler, *budget)
    waiting = memory_for_tools(scheduler, config, copies, support)
    copies.reserve(int(tokens * (1 - config.tool_kv)) if waiting is not None else int(tokens))
    if waiting is not None:
        waiting.reserve(int(tokens * config.tool_kv))
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
    policy = take_over(scheduler, config.record)
    executor = PlanExecutor(
        scheduler, config, policy, copies, costs, support, pipeline_of(scheduler)
    )
    executor.request_states.strips_thinking = get_serving().strip_thinking_cache
    if get_parallel().attn_tp_rank == 0 and executor.pipeline.leads:
        executor.forecasts = Forecasts(
            scheduler, config, policy, executor.planner.tuning, executor.request_states
        )
        executor.forecasts.retune(executor.planner.tuning, config, executor.tenants)
    if waiting is not None:
        queue, paused = executor.planner.queue, executor.paused_requests
        executor.tool_kv = ToolKV(
            scheduler,
            executor.pool,
            waiting,
            paused.transfers,
            costs,
            ToolCalls(scheduler).wait_of,
            # Those that have set out for another instance may come back.
            lambda req: queue.holds(state_of(req)) or paused.status_of(req) is not None,
            lru=get_memory().radix_eviction_policy.lower() == "lru",
        )
    executor.decision_log.file = decision_file(config)
    executor.decision_log.traces = get_observability().enable_trace
    return executor, support


def decision_file(config: PascalConfig) -> DecisionFile | None:
    """The file for decisions, on the rank of an instance that reports them; None on the others.
    Raises: OSError if it cannot be opened."""
    if config.decision_log is None or not speaks():
        return None
    return DecisionFile(config.decision_log, own_instance())


def memory_for_tools(
    scheduler: SchedulerProtocol, config: PascalConfig, copies: HostCopies, support: Support
) -> EntryCopies | None:
    """Host memory for the KV of conversations that wait for a tool; None where that is not asked
    for, or a feature keeps it from being kept, which is logged."""
    if not config.tool_kv:
        return None
    because = first(COPIES, copies) or first(TOOL_KV, scheduler)
    if support.level < Level.PAUSE:
        because = support.because
    if because is None:
        return copies.beside()
    if speaks():
        logger.warning("pascal_sglang: --pascal-tool-kv has no effect, because of %s", because)
    return None


def host_copies_of(scheduler: SchedulerProtocol, *, kept: bool) -> HostCopies:
    """The host memory for a scheduler's KV: in our own form, or in the pool's where that is all we
    know of it. kept: whether pauses keep KV."""
    copies = HostCopies(scheduler, kept=kept)
    # The pool's own form does not have the KV of a draft model.
    if copies.copies or not kept or drafts(scheduler):
        return copies
    return PoolCopies(scheduler)


def host_budget(
    copies: HostCopies, scheduler: SchedulerProtocol, config: PascalConfig, beside: int = 0
) -> tuple[float, float, float]:
    """Tokens of paused KV that this rank may hold in host memory, recurrent states, and entries of
    sliding windows: as many of each as the device has, times the same factor. beside: bytes that
    each rank takes for its receive buffer, of the same memory."""
    parallel = get_parallel()
    if not copies.copies:
        return 0.0, 0.0, 0.0
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
        factor = config.host_kv_gb * 2**30 / parallel.attn_tp_size / device
    else:
        ranks: int = instance_count() * parallel.attn_tp_size
        memory = host_memory()
        left = max(0, memory.free - ranks * beside)
        factor = min(2.0, left / 4 / ranks / device)
        logger.info(
            "pascal_sglang: each of %d ranks takes %.2f GiB of host memory for paused KV: twice "
            "its pool on the device, at most a quarter of the %s, less %.2f GiB for requests that "
            "move (--pascal-host-kv-gb)",
            ranks,
            factor * device / 2**30,
            memory,
            ranks * beside / 2**30,
        )
    return factor * tokens, factor * states, factor * windows
