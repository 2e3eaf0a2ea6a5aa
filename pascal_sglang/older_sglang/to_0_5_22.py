"""From SGLang 0.5.21 to 0.5.22: prefixes as lengths and locks instead of indices and receipts."""

from __future__ import annotations

import dataclasses
from typing import Any

from pascal_sglang.older_sglang.source_patch import patch


def _platforms(module: Any) -> None:
    """A platform says what it can do, and takes SGLang's own pools if it has none. Its methods
    that said so have the same answers for ours. Pages above 1 want Triton here."""
    import msgspec

    names = ("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels")
    fields = [(name, bool, False) for name in names]
    module.PlatformCapabilities = msgspec.defstruct("PlatformCapabilities", fields, kw_only=True)

    def mha_pool(self: Any) -> Any:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def mla_pool(self: Any) -> Any:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        def build(size: int, *, index_head_dim: int | None, **kwargs: Any) -> Any:
            if index_head_dim is not None:
                raise NotImplementedError("a pool with index keys")
            return MLATokenToKVPool(size, **kwargs)

        return build

    def allocator(self: Any) -> Any:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

        def build(size: int, *, page_size: int, **kwargs: Any) -> Any:
            if page_size == 1:
                return TokenToKVPoolAllocator(size, **kwargs)
            return PagedTokenToKVPoolAllocator(size, page_size=page_size, **kwargs)

        return build

    module.SRTPlatform.get_mha_kv_pool_cls = mha_pool
    module.SRTPlatform.get_mla_kv_pool_cls = mla_pool
    module.SRTPlatform.get_paged_allocator_cls = allocator


def _common(module: Any) -> None:
    def async_h2d(args: list[Any], *, dtype: Any, device: Any) -> Any:
        pin = module.is_pin_memory_available(device)
        tensor = module.torch.tensor(args, dtype=dtype, pin_memory=pin)
        return tensor.to(device, non_blocking=pin)

    module.async_h2d = async_h2d


def _schedule_batch(module: Any) -> None:
    req, kv_info, torch = module.Req, module.ReqKvInfo, module.torch

    def set_prefix_len(self: Any, tokens: int) -> None:
        """Of a prefix that is in the request's row already, only the length is read again."""
        self.prefix_indices = torch.zeros(tokens, dtype=torch.int64)

    def set_extend_end(self: Any, end: int | None) -> None:
        if end is None:
            self.extend_range = None
        else:
            self.set_extend_range(self.prefix_len, end)

    def get_lock(self: Any) -> Any:
        if self.last_node is None:
            return None
        return TreeLock(self.last_node, self.lock_receipt, self.swa_prefix_lock_released)

    def set_lock(self: Any, lock: Any) -> None:
        """Without a node, nothing is unlocked on a release."""
        self.last_node = None if lock is None else lock.node
        self.lock_receipt = module.DecLockRefParams() if lock is None else lock.receipt
        self.swa_prefix_lock_released = lock is not None and lock.swa_released

    req.prefix_len = property(lambda self: len(self.prefix_indices), set_prefix_len)
    req.extend_end = property(
        lambda self: None if self.extend_range is None else self.extend_range.end, set_extend_end
    )
    req.lock = property(get_lock, set_lock)
    req.refresh_fill_ids = req._refresh_fill_ids
    req.mamba_lazy_checkpoint = property(lambda self: self.mamba_lazy_is_insert)
    req.decision_layout = req.discard_output_reason = None
    req._session_mm_items = ()
    # Only the hits of a node are counted by it.
    kv_info.cache_inserted_len = property(lambda self: 0, lambda self, tokens: None)
    kv_info.mamba_prev_track_seqlen = None
    stock = module.ScheduleBatch.filter_batch

    def filter_batch(self: Any, reqs_to_exclude: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("chunked_req_to_exclude", reqs_to_exclude)
        stock(self, *args, **kwargs)

    module.ScheduleBatch.filter_batch = filter_batch


def _sampling_params(module: Any) -> None:
    module.SamplingParams.watermark = None


def _runtime_context(module: Any) -> None:
    module.ParallelContext.num_dp_ranks = property(lambda self: self.dp_size)
    module.ParallelContext.attn_dp_enabled = property(lambda self: self.enable_dp_attention)


@dataclasses.dataclass
class TreeLock:
    """A lock on a prefix, as SGLang keeps it in `Req.lock` from 0.5.22 on."""

    node: Any
    receipt: Any
    swa_released: bool = False


def _base_prefix_cache(module: Any) -> None:
    def lock(self: Any, node: Any, *skipped: Any) -> TreeLock:
        return TreeLock(node, self.inc_lock_ref(node, *skipped).to_dec_params())

    def unlock(self: Any, lock: TreeLock | None) -> None:
        if lock is not None:
            skipped = {"skip_swa": True} if lock.swa_released else {}
            self.dec_lock_ref(lock.node, lock.receipt, **skipped)

    def path_device_indices(self: Any, node: Any) -> Any:
        raise NotImplementedError

    # Of a cache without prefixes, which is a class of its own.
    module.BasePrefixCache.root_node = None
    module.BasePrefixCache.path_device_indices = path_device_indices
    module.BasePrefixCache.supports_prefix_sharing = lambda self: not self.is_chunk_cache()
    module.BasePrefixCache.lock = lock
    module.BasePrefixCache.unlock = unlock
    module.MatchResult.device_prefix_len = property(lambda self: len(self.device_indices))


def _radix_cache(module: Any) -> None:
    def path_device_indices(self: Any, node: Any) -> Any:
        values = []
        while node is not self.root_node:
            values.append(node.value)
            node = node.parent
        values.reverse()
        return module.torch.cat(values) if values else self._empty_match_result.device_indices

    module.RadixCache.path_device_indices = path_device_indices


def _unified_radix_cache(module: Any) -> None:
    def path_device_indices(self: Any, node: Any) -> Any:
        return self.tree_core.collect_full_device_indices(node, self.root_node_handle())

    module.UnifiedRadixCache.path_device_indices = path_device_indices


def _mem_cache_common(module: Any) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    def radix_key(
        tree_cache: Any, req: Any, token_ids: Any, max_prefix_len: int | None = None
    ) -> Any:
        tail = tree_cache.swa_reprefill_tail_tokens()
        limit = max(0, len(token_ids) - tail) if tail else None
        if max_prefix_len is not None:
            limit = max_prefix_len if limit is None else min(limit, max_prefix_len)
        return RadixKey(
            token_ids=token_ids, extra_key=req.extra_key, limit=limit, cache_salt=req.cache_salt
        )

    release = module.release_kv_cache

    def release_kv_cache(req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
        release(req, tree_cache, is_insert=checkpoint)

    module._req_radix_key = radix_key
    module.release_kv_cache = release_kv_cache


def _pool_stats(module: Any) -> None:
    def kv_private_tokens(kv: Any, page_size: int) -> int:
        pages = -(-kv.kv_allocated_len // page_size)
        own: int = pages * page_size - kv.cache_protected_len
        return own

    module.kv_private_tokens = kv_private_tokens
    # Of hybrid pools, which this release leaves in SGLang's order: never called.
    module.kv_private_swa_tokens = module.kv_mamba_slots = None


def _allocation(module: Any) -> None:
    module.ensure_mamba_capacity = None


def _invariant_checker(module: Any) -> None:
    """Which requests own rows is a question of its own."""

    def requests_owning_rows(self: Any) -> list[Any]:
        batches = [self.get_last_batch(), self.get_running_batch()]
        reqs = [req for batch in batches if batch is not None for req in batch.reqs]
        if (chunked := self.get_chunked_req()) is not None:
            reqs.append(chunked)
        return [req for req in dict.fromkeys(reqs) if req.kv.holds_kv]

    checker = module.SchedulerInvariantChecker
    checker._requests_owning_rows = requests_owning_rows
    patch(
        checker,
        "_get_total_uncached_sizes",
        ("reqs = [req for batch in batches for req in batch.reqs]", "reqs = []"),
        (
            "chunked_req = self.get_chunked_req()\n"
            "    if chunked_req is not None:\n"
            "        reqs.append(chunked_req)\n",
            "reqs += self._requests_owning_rows()\n",
        ),
    )


def _overlap_utils(module: Any) -> None:
    """What a request brings of its drafts may be no more than where its row is. Tensors of a CPU
    take no note of streams."""

    def make_staged_spec_input(self: Any, future_indices: Any) -> Any:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
        from sglang.srt.speculative.eagle_info import EagleDraftInput

        alone = self.spec_algo.is_standalone()
        return EagleDraftInput(
            capture_hidden_mode=CaptureHiddenMode.NULL if alone else CaptureHiddenMode.LAST,
            future_indices=future_indices,
            future_dsa_topk_indices_available=self.dsa_topk_indices_buf is not None,
        )

    module.FutureMap.make_staged_spec_input = make_staged_spec_input
    patch(
        module.FutureMap,
        "_resolve_spec_extras",
        ("indices.record_stream(", 'if indices.device.type != "cpu": indices.record_stream('),
        (" and draft_input.draft_probs is not None:", ":"),
    )


def _scheduler(module: Any) -> None:
    scheduler = module.Scheduler
    scheduler.reads_hybrid_pools = False
    scheduler.attn_dp_enabled = property(lambda self: self.enable_dp_attention)
    patch(
        scheduler,
        "handle_generate_request",
        ("def handle_generate_request(", "def _handle_generate_request("),
        named="_handle_generate_request",
    )
    scheduler.handle_generate_request = lambda self, recv_req, **kwargs: (
        self._handle_generate_request(recv_req, **kwargs)
    )
    # A step without decoding, after which the running batch goes on.
    patch(
        scheduler,
        "get_next_batch_to_run",
        (
            "            running_batch = self.update_running_batch(running_batch)\n"
            "            ret = running_batch if not running_batch.is_empty() else None\n",
            "            updated = self.update_running_batch(running_batch)\n"
            "            running_batch = running_batch if updated is None else updated\n"
            "            ret = None if updated is None or updated.is_empty() else updated\n",
        ),
    )


def _http_server(module: Any) -> None:
    """The route calls a function that it looks up."""

    async def generate_request(obj: Any, request: Any) -> Any:
        return await module.serve_generate_request(obj, request)

    module.serve_generate_request = module.generate_request
    for route in module.app.router.routes:
        if getattr(route, "endpoint", None) is module.generate_request:
            route.endpoint = route.dependant.call = generate_request


def _controller(module: Any) -> None:
    patch(
        module,
        "run_data_parallel_controller_process",
        (
            "        pipe_writer.send(\n"
            "            {\n"
            '                "status": "ready",\n'
            '                "max_total_num_tokens": controller.max_total_num_tokens,\n'
            '                "max_req_input_len": controller.max_req_input_len,\n'
            '                "startup_time": controller.startup_time,\n'
            "                SCHEDULER_PIDS_ARG: scheduler_pids,\n"
            "            }\n"
            "        )\n",
            "        init_info = {\n"
            '            "status": "ready",\n'
            '            "max_total_num_tokens": controller.max_total_num_tokens,\n'
            '            "max_req_input_len": controller.max_req_input_len,\n'
            '            "startup_time": controller.startup_time,\n'
            "            SCHEDULER_PIDS_ARG: scheduler_pids,\n"
            "        }\n"
            "        pipe_writer.send(init_info)\n",
        ),
    )


PARTS = {
    "sglang.srt.platforms.interface": _platforms,
    "sglang.srt.utils.common": _common,
    "sglang.srt.runtime_context": _runtime_context,
    "sglang.srt.sampling.sampling_params": _sampling_params,
    "sglang.srt.managers.schedule_batch": _schedule_batch,
    "sglang.srt.mem_cache.base_prefix_cache": _base_prefix_cache,
    "sglang.srt.mem_cache.radix_cache": _radix_cache,
    "sglang.srt.mem_cache.unified_radix_cache": _unified_radix_cache,
    "sglang.srt.mem_cache.common": _mem_cache_common,
    "sglang.srt.managers.scheduler_components.pool_stats_observer": _pool_stats,
    "sglang.srt.mem_cache.allocation": _allocation,
    "sglang.srt.managers.scheduler_components.invariant_checker": _invariant_checker,
    "sglang.srt.managers.overlap_utils": _overlap_utils,
    "sglang.srt.managers.scheduler": _scheduler,
    "sglang.srt.managers.data_parallel_controller": _controller,
    "sglang.srt.entrypoints.http_server": _http_server,
}
