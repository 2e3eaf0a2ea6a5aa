"""A pool with sliding windows: entries and their peers, taken, copied and given back."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.capacity import CapacityView
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.pool_copies import PoolCopies
from tests.unit.test_host_copies import ENTRIES, pool_of

WINDOW = 10


def scheduler_of(page):
    """A real allocator over real pools' classes, whose buffers are of our own."""
    whole, windowed = pool_of(MHATokenToKVPool), pool_of(MHATokenToKVPool)
    for pool in (whole, windowed):
        pool.cpu_offloading_chunk_size, pool.layer_num, pool.use_hnd = 64, 3, False
        pool.register_layer_transfer_counter = None
    pool = object.__new__(SWAKVPool)
    pool.full_kv_pool, pool.swa_kv_pool = whole, windowed
    size = ENTRIES - page
    allocator = SWATokenToKVPoolAllocator(
        size, size // 2, page, torch.float32, "cpu", pool, need_sort=False
    )
    tree = SimpleNamespace(
        swa_retain_window=WINDOW,
        sliding_window_size=WINDOW,
        evictable_size=lambda: 0,
        full_evictable_size=lambda: 0,
        swa_evictable_size=lambda: 0,
        evict_for_alloc=lambda _: None,
    )
    return SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=None,
        tree_cache=tree,
        page_size=page,
        device="cpu",
        attn_tp_cpu_group=SimpleNamespace(size=lambda: 1),
        max_total_num_tokens=size,
        chunked_prefill_size=None,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )


def request(shared):
    return SimpleNamespace(kv=SimpleNamespace(cache_protected_len=shared, req_pool_idx=1))


def content(scheduler, locations, before):
    """What the layers see of a request."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    peers = pool.translate_loc_from_full_to_swa(locations[before:])
    assert (peers > 0).all()
    whole, windowed = pool.full_kv_pool, pool.swa_kv_pool
    return [
        *(b[locations].clone() for b in (*whole.k_buffer, *whole.v_buffer)),
        *(b[peers].clone() for b in (*windowed.k_buffer, *windowed.v_buffer)),
    ]


@pytest.mark.parametrize("kind", [HostCopies, PoolCopies])
@pytest.mark.parametrize("shared", [0, 16, 24])
@pytest.mark.parametrize("page", [1, 8])
def test_there_and_back_elsewhere(page, shared, kind):
    scheduler = scheduler_of(page)
    pool, copies = Pool(scheduler), kind(scheduler)
    copies.reserve(64)
    if copies.windows is not None:
        copies.windows.reserve(32)
    tokens = 29
    before = pool.windows.before(tokens)
    assert before == (19 if page == 1 else 16)
    free = pool.windows.free_whole, pool.windows.free
    locations = pool.take(tokens, before)
    paged = pool.in_pages(tokens)
    assert (pool.windows.free_whole, pool.windows.free) == (
        free[0] - paged,
        free[1] - paged + before,
    )
    expected = content(scheduler, locations, before)
    copy = copies.save(request(shared), locations)
    assert copy.before == before
    pool.give(locations, before)
    assert (pool.windows.free_whole, pool.windows.free) == free
    pool.take(8)  # Other entries are the next.
    allocator = scheduler.token_to_kv_pool_allocator
    for part in (allocator.get_kvcache().full_kv_pool, allocator.get_kvcache().swa_kv_pool):
        for buffer in (*part.k_buffer, *part.v_buffer):
            buffer.zero_()
    again = pool.take(tokens, before)
    copies.load(request(shared), copy, again, 0)
    parts = copies.parts_of(copy)
    assert all(owner.wait(part) for owner, part in parts)
    for found, was in zip(content(scheduler, again, before), expected, strict=True):
        assert torch.equal(found, was)
    for owner, part in parts:
        owner.free(part)
    assert copies.room == 64


def test_what_is_not_there_is_not_given():
    scheduler = scheduler_of(1)
    pool = Pool(scheduler)
    whole, windowed = pool.windows.free_whole, pool.windows.free
    assert windowed < whole
    assert pool.take(windowed + 1) is None
    assert pool.take(whole + 1, whole) is None
    assert (pool.windows.free_whole, pool.windows.free) == (whole, windowed)
    assert len(pool.take(whole, whole - windowed)) == whole
    assert (pool.windows.free_whole, pool.windows.free) == (0, 0)


def test_a_prefill_wants_its_chunk_and_a_window():
    scheduler = scheduler_of(8)
    windows = Pool(scheduler).windows
    assert windows.size == 44
    assert windows.for_prefill(4, 100) == WINDOW + 8 + 1
    assert windows.for_prefill(24, 100) == 24 + 8 + 1
    assert windows.for_prefill(60, 100) == WINDOW + 2 * 8 + 1, "the pool holds no such chunk"
    scheduler.chunked_prefill_size = 16
    assert windows.for_prefill(60, 100) == 16 + 8 + 1


def test_host_memory_for_a_window_is_room_for_a_request():
    scheduler = scheduler_of(8)
    copies = HostCopies(scheduler)
    copies.reserve(64)
    copies.windows.reserve(copies.window_tokens - 1)
    assert copies.room == 0


def test_where_pauses_keep_no_kv_there_is_no_copy():
    copies = HostCopies(scheduler_of(8), kept=False)
    assert (copies.copies, copies.windows) == (False, None)


def test_the_scarcest_of_what_a_request_takes_is_reported():
    """To the controller: windows are short where KV is not."""
    scheduler = scheduler_of(1)
    scheduler.chunked_req = None
    pool = Pool(scheduler)
    capacity = CapacityView(scheduler=scheduler, paused_requests=None, pool=pool, lora_slots=None)
    assert (capacity.used_share(), capacity.requests_beside()) == (0, 4)
    assert pool.windows.most == 11
    pool.take(24)
    assert capacity.used_share() == pytest.approx(24 / pool.windows.size)
    assert capacity.requests_beside() == 2
    pool.take(48, 48)
    assert capacity.used_share() == pytest.approx(72 / scheduler.max_total_num_tokens)
    pool.windows = None
    pool.states = SimpleNamespace(free=7, size=70, for_prefill=3)
    assert (capacity.used_share(), capacity.requests_beside()) == (pytest.approx(0.9), 2)
