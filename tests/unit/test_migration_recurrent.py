"""A recurrent state on its way to another instance: it goes with the last piece of KV, and its slot
is reserved and given back with the rest."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pascal_sglang.engine.kv.recurrent_states import RecurrentStates, bind
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.kv.transfers import Transfers
from pascal_sglang.engine.migration.receive_buffer import ReceiveBuffer, receive_buffer_bytes
from tests.unit.test_host_copies import SLOTS, copies_of, hybrid, pool_of, rows_of

TOKENS = 7


class Side:
    """The pools of one instance, and its receive buffer."""

    def __init__(self):
        self.rows = rows_of()
        self.rows.mamba_initial_tracking_slots = 2
        self.copies, scheduler = copies_of(hybrid(pool_of(MHATokenToKVPool)), rows=self.rows)
        self.copies.states.reserve(1)
        scheduler.tree_cache = SimpleNamespace(supports_prefix_sharing=lambda: False)
        self.states = RecurrentStates(scheduler)
        self.kv = KVSerializer(self.copies, "model", lambda: "default")
        pool = SimpleNamespace(
            windows=None,
            states=self.states,
            in_pages=lambda tokens: tokens,
            take=lambda tokens, before: torch.arange(20, 20 + tokens),
            take_state=self.states.take,
            give=lambda locations, before: None,
            give_windows=lambda locations: None,
        )
        memory = memoryview(bytearray(receive_buffer_bytes(self.kv)))
        self.receive_buffer = ReceiveBuffer(pool, self.kv, memory, Transfers(scheduler))

    def state(self, slot):
        return [buffer[slot].clone() for buffer in self.copies.states.buffers]

    def entries(self, where):
        return [buffer[where].clone() for buffer in self.copies.buffers]


@pytest.fixture
def sides(monkeypatch):
    parallel = SimpleNamespace(attn_tp_size=1)
    monkeypatch.setattr("pascal_sglang.engine.kv.serializer.get_parallel", lambda: parallel)
    return Side(), Side()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_a_state_goes_with_the_last_piece(sides, tokens, paused):
    source, target = sides
    # The second slot, so that nothing is the same by chance.
    first, second = (target.receive_buffer.reserve(m, 0, TOKENS, 0) for m in "mn")
    assert target.states.free == SLOTS - 2
    at = target.receive_buffer.offset(second)
    size = source.kv.size(tokens, 0, state=True)
    memory = target.receive_buffer.memory[at : at + size]
    where, slot = torch.arange(5, 5 + tokens), torch.tensor([4])
    if paused:
        kept = source.copies.states.to_host(slot)
        assert source.copies.states.wait(kept)
        source.kv.state_host(kept, memory)
    else:
        source.kv.state_out(slot, memory, parts := [])
        assert source.kv.wait(parts)
    if tokens:
        source.kv.copy_out(where, 0, memory, parts := [])
        assert source.kv.wait(parts)
    assert target.receive_buffer.fetch(second, 0, tokens, 0, stopped=True)
    arrived, was = target.state(second.state), source.state(slot)
    assert all(map(torch.equal, arrived, was))
    arrived, was = target.entries(second.locations[:tokens]), source.entries(where)
    assert all(map(torch.equal, arrived, was))
    assert not all(map(torch.equal, target.state(first.state), source.state(slot)))


def test_the_slot_of_a_state_is_the_requests_or_comes_back(sides):
    _, target = sides
    kept, dropped = (target.receive_buffer.reserve(m, 0, TOKENS, 0) for m in "mn")
    target.receive_buffer.drop(dropped, "timeout", 1.0)
    assert target.states.free == SLOTS - 1
    target.receive_buffer.keep(kept, TOKENS, 0, 1.0)
    assert (target.states.free, target.receive_buffer.reserved) == (SLOTS - 1, 0)
    req = SimpleNamespace(kv=ReqKvInfo())
    bind(req, kept.state)
    assert target.states.held(req) == 1
    assert target.states.for_return(req) == 2, "those that track it are taken when it goes on"
    req.kv.mamba_ping_pong_track_buffer = torch.tensor([1, 2])
    assert target.states.for_return(req) == 0
    req.kv.mamba_ping_pong_track_buffer = None
    target.states.release(req)
    assert target.states.free == SLOTS


def test_a_request_that_comes_without_kv_needs_no_state(sides):
    _, target = sides
    for _ in range(SLOTS):
        target.states.take()
    coming = target.receive_buffer.reserve("m", 0, 0, 0)
    assert target.receive_buffer.fetch(coming, 0, 0, 0, stopped=True)
    assert not coming.reading, "nothing of its slot is read"
    target.receive_buffer.keep(coming, 0, 0, 1.0)
    assert (target.states.free, target.receive_buffer.reserved) == (0, 0)


def test_nothing_is_reserved_without_a_slot_for_the_state(sides):
    _, target = sides
    taken = [target.states.take() for _ in range(SLOTS)]
    assert target.receive_buffer.reserve("m", 0, TOKENS, 0) is None
    assert target.receive_buffer.reserved == 0
    target.states.give(taken[0])
    assert target.receive_buffer.reserve("m", 0, TOKENS, 0) is not None
