"""The prefix of a paused request that SGLang's hierarchical cache holds in host memory.

A write-through cache copies the KV of a prompt to its host pool when the prompt is prefilled. A
pause does not copy it again: it keeps the host pool from evicting the prefix, and the resume has
the cache load what the device no longer has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol


@dataclass(slots=True)
class HeldPrefix:
    """A prefix that the host pool does not evict."""

    # Its last node in the prefix cache.
    node: Any
    # What SGLang gave for the lock.
    receipt: Any


class HostCache:
    """The host pool of one scheduler's prefix cache."""

    # Loads that may be under way, besides the one of the next prefill: SGLang has an event for each
    # and asserts that there is a free one.
    most_loads: int

    def __init__(self, scheduler: SchedulerProtocol) -> None:
        self._scheduler = scheduler
        self.most_loads = self._tree.cache_controller.layer_done_counter.num_counters - 1

    @property
    def _tree(self) -> Any:
        return self._scheduler.tree_cache

    def hold(self, node: Any) -> HeldPrefix | None:
        """Hold the prefix that ends at `node`; None if the pool does not have all of it."""
        tree = self._tree
        if node is None or tree.is_root(node) or not tree.is_backuped(node):
            return None
        return HeldPrefix(node, tree.inc_host_lock_ref(node).to_dec_params())

    def release(self, held: HeldPrefix) -> None:
        """The pool may evict the prefix again."""
        self._tree.dec_host_lock_ref(held.node, held.receipt)

    def load(self, match: Any, req: Req) -> Any:
        """Bring the prefix of a match to the device. Returns the event after which it is there;
        None if it cannot be had now."""
        tree = self._tree
        controller = tree.cache_controller
        if len(controller.ack_load_queue) >= self.most_loads:
            return None
        # A short piece is left to a prefill otherwise, and there is none.
        least, tree.load_back_threshold = tree.load_back_threshold, 0
        try:
            if not tree.load_back(match.best_match_node, req=req):
                return None
        finally:
            tree.load_back_threshold = least
        tree.ready_to_load_host_cache()
        return controller.ack_load_queue[-1].finish_event


def size_bytes(scheduler: SchedulerProtocol) -> int:
    """Host memory that the hierarchical cache takes in this rank; 0 without one."""
    controller = getattr(scheduler.tree_cache, "cache_controller", None)
    if controller is None:
        return 0
    pools = [entry.host_pool for entry in controller.mem_pool_host.entries]
    return sum(int(pool.size * pool.size_per_token) for pool in pools)


def host_cache_of(scheduler: SchedulerProtocol) -> HostCache | None:
    """The scheduler's host pool; None without one, and where a node of the prefix cache has more
    than KV, or its host memory is only a way to other storage."""
    tree = scheduler.tree_cache
    if getattr(tree, "cache_controller", None) is None:
        return None
    plain = len(tree.tree_components) == 1 and tree.host_memory_mode != "buffer_only"
    return HostCache(scheduler) if plain and tree.linker is None else None
