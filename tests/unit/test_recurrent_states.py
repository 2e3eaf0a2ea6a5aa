"""The slots of recurrent states: how many may be given, and that all of a request's come back."""

from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from pascal_sglang.engine.kv.recurrent_states import RecurrentStates, recurrent_states_of

SLOTS, EVICTABLE = 9, 2


def scheduler(*, caches=True, in_flight=(), chunked=None):
    tree = SimpleNamespace(
        supports_prefix_sharing=lambda: caches,
        supports_mamba=lambda: True,
        mamba_evictable_size=lambda: EVICTABLE,
    )
    rows = SimpleNamespace(
        mamba_allocator=MambaSlotAllocator(SLOTS, "cpu"),
        mamba_initial_tracking_slots=2,
        mamba_ckpt_pool=None,
        mamba_pool=None,
    )
    return SimpleNamespace(
        req_to_token_pool=rows, tree_cache=tree, result_queue=in_flight, chunked_req=chunked
    )


def batch(mode, *reqs):
    return SimpleNamespace(forward_mode=mode, reqs=reqs), None


def test_what_prefills_will_take_is_not_given():
    assert RecurrentStates(scheduler()).free == SLOTS + EVICTABLE
    in_flight = [batch(ForwardMode.EXTEND, "a", "b"), batch(ForwardMode.DECODE, "c", "d")]
    assert RecurrentStates(scheduler(in_flight=in_flight)).free == SLOTS + EVICTABLE - 2
    both = RecurrentStates(scheduler(in_flight=in_flight, chunked="b"))
    assert both.free == SLOTS + EVICTABLE - 2
    other = RecurrentStates(scheduler(in_flight=in_flight, chunked="e"))
    assert other.free == SLOTS + EVICTABLE - 3


def test_without_a_prefix_cache_a_prefill_takes_but_its_own():
    states = RecurrentStates(scheduler(caches=False, chunked="a"))
    assert (states.free, states.for_prefill) == (SLOTS, 3)
    assert RecurrentStates(scheduler()).for_prefill == 5


def test_all_slots_of_a_request_without_a_row_come_back():
    states = RecurrentStates(scheduler())
    own, *tracked = states._rows.mamba_allocator.alloc(3)
    kv = ReqKvInfo(mamba_pool_idx=own, mamba_last_track_seqlen=64, mamba_next_track_idx=1)
    kv.mamba_ping_pong_track_buffer = torch.stack([tracked[0], torch.tensor(-1)])
    kv.mamba_ping_pong_empty = [False, True]
    req = SimpleNamespace(kv=kv)
    assert states.held(req) == 2
    assert torch.equal(states.location(req), own.view(1))
    states.release(req)
    assert states.free == SLOTS + EVICTABLE - 1, "the third was never the request's"
    assert states.held(req) == 0
    assert not kv.holds_mamba
    assert (kv.mamba_last_track_seqlen, kv.mamba_next_track_idx) == (None, None)


def test_a_model_without_recurrent_layers_has_none():
    assert recurrent_states_of(scheduler()) is None
