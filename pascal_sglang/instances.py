"""Which instance this process belongs to, and of how many.

An instance has requests and KV of its own: a replica (`--dp-size`), or a rank of DP attention
(`--attn-dp-size`), whose steps the instances take together.
"""

from __future__ import annotations

import os

from sglang.srt.runtime_context import get_parallel

# The host of each instance, where they are on several; for every process of the server.
HOSTS_ENV = "PASCAL_SGLANG_HOSTS"


def instance_count() -> int:
    """Instances of this server."""
    count: int = get_parallel().num_dp_ranks
    return count


def own_instance() -> int:
    """The index of this scheduler's instance."""
    index: int = get_parallel().dp_rank or 0
    return index


def several_hosts() -> bool:
    """Whether instances of this server are on several hosts."""
    return HOSTS_ENV in os.environ


def hosts() -> list[str]:
    """The address of the host of each instance; none where all are on one."""
    return os.environ[HOSTS_ENV].split(",") if several_hosts() else []


def step_together() -> bool:
    """Whether no instance can go on without the others."""
    together: bool = get_parallel().attn_dp_enabled
    return together


def speaks() -> bool:
    """Whether this rank is the one that speaks for its instance: of several that do the same."""
    parallel = get_parallel()
    first: bool = parallel.attn_tp_rank == 0 and parallel.pp_rank == 0
    return first
