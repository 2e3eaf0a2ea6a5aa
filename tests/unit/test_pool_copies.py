"""KV copied by the pool's own code, there and back: the same bytes as in our own form."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MLATokenToKVPool,
    MLATokenToKVPoolFP4,
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.pool import measure_costs
from pascal_sglang.engine.kv.pool_copies import PoolCopies
from tests.unit.test_host_copies import pool_of

REQ = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=3, cache_protected_len=2))


def scheduler_of(pool):
    pool.cpu_offloading_chunk_size = 4
    pool.layer_num = 3
    pool.use_hnd = False
    allocator = SimpleNamespace(
        get_kvcache=lambda: pool, get_cpu_copy=pool.get_cpu_copy, load_cpu_copy=pool.load_cpu_copy
    )
    return SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=None,
        device="cpu",
        max_total_num_tokens=95,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )


@pytest.mark.parametrize("kind", [MHATokenToKVPool, MLATokenToKVPool])
def test_there_and_back_elsewhere(kind):
    with get_parallel().override(attn_dcp_rank=0):
        there_and_back(kind)


def there_and_back(kind):
    scheduler = scheduler_of(pool_of(kind))
    copies, ours = PoolCopies(scheduler), HostCopies(scheduler)
    copies.reserve(10)
    before = [buffer.clone() for buffer in ours.buffers]
    source, target = torch.tensor([5, 3, 40, 41, 90, 12]), torch.tensor([1, 2, 80, 7, 6, 11])
    copy = copies.save(REQ, source)
    assert (copy.tokens, copy.shared, copies.room) == (6, 0, 4)
    for buffer in ours.buffers:
        buffer[source] = 0
    copies.load(REQ, copy, target, 0)
    assert all(copies.wait(half) for half in copy.halves())
    for buffer, was in zip(ours.buffers, before, strict=True):
        assert torch.equal(buffer[target], was[source])
    for half in copy.halves():
        copies.free(half)
    assert copies.room == 10
    measure_costs(scheduler, copies)
    assert copies.room == 10
    assert copies.bytes_per_token == ours.bytes_per_token
    with pytest.raises(RuntimeError, match="no host memory for 11"):
        copies.save(REQ, torch.arange(11))


def arranged():
    """Its rows are not tokens; SGLang's copies refuse it."""
    pool = pool_of(MHATokenToKVPool)
    pool.kv_cache_layout = "hnd"
    return pool


@pytest.mark.parametrize(
    "pool",
    [
        arranged(),
        # Their copies leave the scales behind.
        pool_of(MHATokenToKVPoolFP4),
        pool_of(MLATokenToKVPoolFP4),
        pool_of(MLATokenToKVPool, scales=[torch.ones(1)]),
    ],
)
def test_pools_whose_own_copies_are_not_whole_are_not_copied(pool):
    scheduler = scheduler_of(pool)
    pool.use_hnd = pool.kv_cache_layout == "hnd" if hasattr(pool, "kv_cache_layout") else False
    copies = PoolCopies(scheduler)
    assert not copies.copies
    assert copies.bytes_per_token == int(0.001 * 2**30 / 95)


def test_a_device_that_fails_says_so(caplog):
    scheduler = scheduler_of(pool_of(MHATokenToKVPool))
    copies = PoolCopies(scheduler)
    copies.reserve(10)

    def fail(*_, **__):
        raise RuntimeError("the device is gone")

    copy = copies.save(REQ, torch.arange(5))
    scheduler.token_to_kv_pool_allocator.load_cpu_copy = fail
    copies.load(REQ, copy, torch.arange(5), 0)
    assert copy.own.failed
    scheduler.token_to_kv_pool_allocator.get_cpu_copy = fail
    failed = copies.save(REQ, torch.arange(5))
    assert not copies.wait(failed.own)
    assert "the device is gone" in caplog.text
    assert copies.room == 0, "as on the other ranks"
