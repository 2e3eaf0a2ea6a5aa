"""KV copied to host memory and back, byte for byte, for the pools that are copied."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.engine.kv.copy_stream import CopyStream
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.pool import measure_costs

ENTRIES = 96


def pool_of(kind, dtype=torch.float32, scales=None):
    """A real pool's class around buffers of our own: building one wants a published server."""
    pool = object.__new__(kind)
    pool.store_dtype = dtype

    def buffer(*row):
        whole = torch.randint(0, 200, (ENTRIES, *row))
        return whole.to(torch.uint8) if dtype is torch.uint8 else whole.to(dtype)

    pool.mem_usage = 0.001
    if issubclass(kind, MHATokenToKVPool):
        pool.kv_cache_layout, pool.quant_method = "nhd", UnquantizedKVCacheMethod()
        pool.k_buffer = [buffer(2, 8) for _ in range(3)]
        pool.v_buffer = [buffer(2, 4) for _ in range(3)]
    else:
        pool.write_loc_is_dcp_resolved, pool.kv_scale_buffer = True, scales
        pool.kv_buffer = [buffer(1, 12) for _ in range(2)] + [torch.empty(0, 1, 12)]
    return pool


class Broken:
    """A buffer on a device that fails."""

    device = "cpu"

    def __getitem__(self, _):
        raise RuntimeError("the device is gone")

    def __setitem__(self, _, value):
        raise RuntimeError("the device is gone")


LAYERS, SLOTS = 3, 6


def rows_of(**more):
    """Request rows with recurrent states, of real classes around buffers of our own."""
    rows, pool = object.__new__(HybridReqToTokenPool), object.__new__(MambaPool)
    pool.mamba_cache = MambaPool.State(
        conv=[torch.rand(LAYERS, SLOTS + 1, 8, 3)], temporal=torch.rand(LAYERS, SLOTS + 1, 2, 4, 4)
    )
    pool.replayssm_write_pos = None
    rows.mamba_pool, rows.mamba_ckpt_pool = pool, None
    rows.mamba_allocator = MambaSlotAllocator(SLOTS, "cpu")
    for name, value in more.items():
        setattr(pool, name, value)
    return rows


def copies_of(pool, room=ENTRIES, rows=None):
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=rows,
        device="cpu",
        attn_tp_cpu_group=SimpleNamespace(size=lambda: 1),
        max_total_num_tokens=ENTRIES - 1,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    copies = HostCopies(scheduler)
    copies.reserve(room)
    return copies, scheduler


@pytest.mark.parametrize("kind", [MHATokenToKVPool, MLATokenToKVPool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_there_and_back_elsewhere(kind, dtype):
    copies, _ = copies_of(pool_of(kind, dtype))
    before = [buffer.clone() for buffer in copies.buffers]
    source, target = torch.tensor([5, 3, 40, 41, 90]), torch.tensor([1, 2, 80, 7, 6])
    kv = copies.to_host(source)
    for buffer in copies.buffers:
        buffer[source] = 0
    assert copies.wait(kv)
    copies.to_device(kv, target)
    for buffer, was in zip(copies.buffers, before, strict=True):
        assert torch.equal(buffer[target], was[source])
    assert copies.room == ENTRIES - 5
    copies.free(kv)
    assert copies.room == ENTRIES
    assert copies.bytes_per_token == sum(b[0].nbytes for b in copies.buffers)


def hybrid(pool):
    """The pool of a model some of whose layers are recurrent."""
    whole = object.__new__(HybridLinearKVPool)
    whole.full_kv_pool, whole.mem_usage = pool, pool.mem_usage
    return whole


def test_a_recurrent_state_goes_with_its_kv():
    rows = rows_of()
    copies, scheduler = copies_of(hybrid(pool_of(MHATokenToKVPool)), rows=rows)
    assert copies.room == 0, "no memory for states yet"
    copies.states.reserve(1)
    cache = rows.mamba_pool.mamba_cache
    before = [state.clone() for state in (*cache.conv, cache.temporal)]
    kept = copies.states.to_host(torch.tensor([4]))
    assert copies.room == 0, "nothing is copied whose state cannot be"
    for state in (*cache.conv, cache.temporal):
        state[:, 4] = 0
    copies.states.to_device(kept, torch.tensor([2]))
    assert copies.states.wait(kept)
    for state, was in zip((*cache.conv, cache.temporal), before, strict=True):
        assert torch.equal(state[:, 2], was[:, 4])
        assert torch.equal(state[:, 3], was[:, 3])
    copies.states.free(kept)
    assert copies.states.bytes_per_entry == 4 * LAYERS * (8 * 3 + 2 * 4 * 4)
    before = [state.clone() for state in (*cache.conv, cache.temporal)]
    assert measure_costs(scheduler, copies).copy_s > 0
    assert all(map(torch.equal, before, (*cache.conv, cache.temporal)))
    assert copies.room == ENTRIES


@pytest.mark.parametrize(
    "more", [{"replayssm_write_pos": torch.zeros(1)}, {"_slot_siblings": [object()]}]
)
def test_kv_whose_state_is_more_than_we_know_is_not_copied(more):
    copies, _ = copies_of(hybrid(pool_of(MHATokenToKVPool)), rows=rows_of(**more))
    assert copies.buffers is None
    assert copies.room == 0


def test_copies_do_not_share_memory():
    copies, _ = copies_of(pool_of(MHATokenToKVPool))
    first, second = copies.to_host(torch.arange(10)), copies.to_host(torch.arange(10, 30))
    assert torch.equal(first.parts[0][:10], copies.buffers[0][:10])
    assert torch.equal(second.parts[0][10:30], copies.buffers[0][10:30])


def test_memory_that_lies_scattered_holds_a_copy_too():
    copies, _ = copies_of(pool_of(MHATokenToKVPool), room=40)
    kept = [copies.to_host(torch.arange(10 * i, 10 * i + 10)) for i in range(4)]
    copies.free(kept[0])
    copies.free(kept[2])
    expected = [buffer[50:68].clone() for buffer in copies.buffers]
    kv = copies.to_host(torch.arange(50, 68))
    assert len(kv.ranges) == 2
    copies.to_device(kv, torch.arange(70, 88))
    assert all(map(torch.equal, [buffer[70:88] for buffer in copies.buffers], expected))
    assert all(
        map(torch.equal, [b[30:40] for b in kept[3].parts], [b[30:40] for b in copies.buffers])
    )


class Counting(CopyStream):
    """Counts launches; the next ones fail that `fails` names by their number."""

    def __init__(self, fails=()):
        self.launched, self.fails = 0, fails

    def run(self, copy, locations, *, after_steps):
        self.launched += 1
        if self.launched in self.fails:
            raise torch.OutOfMemoryError("on purpose")
        copy()
        return SimpleNamespace(query=lambda: True, synchronize=lambda: None)


def test_what_is_copied_together_goes_by_one_launch_each_way():
    """In the order asked for: memory that one gives back may be the next one's."""
    copies, _ = copies_of(pool_of(MHATokenToKVPool), room=40)
    copies._stream = stream = Counting()
    before = [buffer.clone() for buffer in copies.buffers]
    with copies.together():
        kept = [copies.to_host(torch.arange(10 * i, 10 * i + 10)) for i in range(3)]
        copies.read(torch.arange(4), HostKV([b[:4].clone() for b in copies.buffers]))
        assert stream.launched == 1, "memory of another kind"
    assert stream.launched == 2
    assert kept[0].done is kept[2].done
    assert all(copies.wait(kv) for kv in kept)
    with copies.together():
        copies.to_device(kept[1], torch.arange(60, 70))
        copies.to_device(kept[0], torch.arange(70, 80))
        copies.free(kept[1])
        over = copies.to_host(torch.arange(30, 50))
    assert over.ranges == [(10, 20), (30, 40)]
    assert stream.launched == 4
    for buffer, was, part in zip(copies.buffers, before, over.parts, strict=True):
        assert torch.equal(buffer[60:80], torch.cat([was[10:20], was[:10]]))
        assert torch.equal(torch.cat([part[10:20], part[30:40]]), was[30:50])


def test_what_fails_together_is_tried_one_by_one():
    copies, _ = copies_of(pool_of(MHATokenToKVPool))
    copies._stream = stream = Counting(fails=(1, 3))
    with copies.together():
        kept = [copies.to_host(torch.arange(10 * i, 10 * i + 10)) for i in range(3)]
    assert stream.launched == 4
    assert [copies.wait(kv) for kv in kept] == [True, False, True]
    assert torch.equal(kept[2].parts[0][20:30], copies.buffers[0][20:30])


def test_an_error_of_the_caller_leaves_no_copy_that_never_begins():
    rows = rows_of()
    copies, _ = copies_of(hybrid(pool_of(MHATokenToKVPool)), rows=rows)
    copies.states.reserve(2)
    copies._stream = copies.states._stream = stream = Counting()
    kept = []

    def fails():
        with copies.together():
            copies.to_host(torch.arange(5))
            kept.extend(copies.states.to_host(torch.tensor([number])) for number in (3, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert stream.launched == 2
    temporal = rows.mamba_pool.mamba_cache.temporal.transpose(0, 1)
    assert torch.equal(kept[0].parts[-1], temporal[[3, 1]])
    with copies.together():
        pass
    assert stream.launched == 2


def test_without_room_nothing_is_copied():
    copies, scheduler = copies_of(pool_of(MHATokenToKVPool), room=4)
    with pytest.raises(RuntimeError, match="no host memory for 5"):
        copies.to_host(torch.arange(5))
    assert copies.room == 4
    nothing, _ = copies_of(pool_of(MHATokenToKVPool), room=0)
    assert measure_costs(scheduler, nothing).copy_s == 0


def test_a_device_that_fails_says_so_and_keeps_its_memory_until_it_is_freed(caplog):
    copies, _ = copies_of(pool_of(MHATokenToKVPool))
    copies.buffers[1] = Broken()
    kv = copies.to_host(torch.arange(5))
    assert not copies.wait(kv)
    assert "the device is gone" in caplog.text
    assert copies.room == ENTRIES - 5, "as on the other ranks"
    copies.free(kv)
    assert copies.room == ENTRIES


def test_a_device_that_fails_on_the_way_back_says_so_too(caplog):
    copies, _ = copies_of(pool_of(MHATokenToKVPool))
    kv = copies.to_host(torch.arange(5))
    assert copies.wait(kv)
    copies.buffers[1] = Broken()
    copies.to_device(kv, torch.arange(5))
    assert kv.failed
    assert not copies.wait(kv)
    assert "the device is gone" in caplog.text


def test_a_device_that_copies_nothing_is_no_device_to_serve_on():
    copies, scheduler = copies_of(pool_of(MHATokenToKVPool))
    copies.buffers[1] = Broken()
    with pytest.raises(RuntimeError, match="cannot be copied"):
        measure_costs(scheduler, copies)


def test_measuring_changes_nothing_and_keeps_nothing():
    copies, scheduler = copies_of(pool_of(MLATokenToKVPool))
    before = [buffer.clone() for buffer in copies.buffers]
    costs = measure_costs(scheduler, copies)
    assert costs.copy_s > 0
    assert all(map(torch.equal, before, copies.buffers))
    assert copies.room == ENTRIES


def subclass(kind):
    return type("Other", (kind,), {})


@pytest.mark.parametrize(
    "pool",
    [
        pool_of(subclass(MHATokenToKVPool)),
        pool_of(subclass(MLATokenToKVPool)),
        pool_of(MLATokenToKVPool, scales=[torch.ones(1)]),
        SimpleNamespace(mem_usage=0.001),
    ],
)
def test_pools_that_hold_more_than_rows_are_not_copied(pool):
    copies, _ = copies_of(pool)
    assert copies.buffers is None
    assert copies.room == 0
    assert copies.bytes_per_token == int(0.001 * 2**30 / (ENTRIES - 1))


def test_quantised_or_rearranged_rows_are_not_copied():
    quantised = pool_of(MHATokenToKVPool)
    quantised.quant_method = object()
    rearranged = pool_of(MHATokenToKVPool)
    rearranged.kv_cache_layout = "hnd"
    assert copies_of(quantised)[0].buffers is None
    assert copies_of(rearranged)[0].buffers is None


@pytest.mark.parametrize("ranges", [None, [(0, 5)], [(4, 7), (0, 2)]])
def test_a_part_of_a_copy_is_where_those_entries_are(ranges):
    """Which may be in several stretches."""
    memory = torch.arange(8 if ranges else 5)
    whole = HostKV([memory], ranges=ranges)
    order = [place for first, last in whole.places for place in range(first, last)]
    for begin in range(6):
        for end in range(begin, 6):
            part = whole.between(begin, end)
            found = [place for first, last in part.places for place in range(first, last)]
            assert (found, part.tokens) == (order[begin:end], end - begin)
            assert part.parts is whole.parts
