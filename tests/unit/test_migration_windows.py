"""KV with sliding windows on its way to another instance: what no window sees any more stays, and
both pools of the target get all back that is not the request's."""

from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.cluster.migration_source import WINDOWS
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.serializer import KVSerializer
from pascal_sglang.engine.kv.transfers import Transfers
from pascal_sglang.engine.migration.receive_buffer import ReceiveBuffer, receive_buffer_bytes
from tests.unit.test_windows import content, request, scheduler_of

# Tokens when the target is asked, at each piece, and at the end.
ASKED, MOST = 19, 40
PIECES = ((0, 16, 20), (16, 22, 22), (22, 24, 24))


class Side:
    """The pools of one instance, and its receive buffer."""

    def __init__(self, page):
        self.scheduler = scheduler_of(page)
        self.pool, self.copies = Pool(self.scheduler), HostCopies(self.scheduler)
        self.copies.reserve(64)
        self.copies.windows.reserve(32)
        self.kv = KVSerializer(self.copies, "model", lambda: "default")
        memory = memoryview(bytearray(receive_buffer_bytes(self.kv)))
        self.receive_buffer = ReceiveBuffer(self.pool, self.kv, memory, Transfers(self.scheduler))

    @property
    def free(self):
        return self.pool.windows.free_whole, self.pool.windows.free

    @property
    def reserved(self):
        return self.receive_buffer.reserved, self.receive_buffer.reserved_windows

    def slot(self, reservation, size):
        """Where its next piece is."""
        at = self.receive_buffer.offset(reservation)
        window = reservation.pieces % WINDOWS
        at += window * self.kv.window_bytes(self.receive_buffer.slot_tokens)
        return self.receive_buffer.memory[at : at + size]


@pytest.fixture(params=[1, 8])
def sides(request, monkeypatch):
    parallel = SimpleNamespace(attn_tp_size=1)
    monkeypatch.setattr("pascal_sglang.engine.kv.serializer.get_parallel", lambda: parallel)
    return Side(request.param), Side(request.param)


def send(source, target, where, reservation, kept=None):
    """Piece by piece; `where` is the source's KV, or in the copy `kept`."""
    for begin, end, tokens in PIECES:
        before = source.pool.windows.before(tokens)
        here = max(0, before - begin)
        memory = target.slot(reservation, source.kv.size(end - begin, here))
        if kept is None:
            source.kv.copy_out(where[begin:end], here, memory, parts := [])
            assert source.kv.wait(parts)
        else:
            before = max(before, kept.before)
            here = max(0, before - begin)
            source.kv.copy_host(kept, begin, end, here, memory)
        assert target.receive_buffer.fetch(reservation, begin, end, before)
        assert target.receive_buffer.has_read(reservation)
        memory[:] = bytes(len(memory))
    return before


@pytest.mark.parametrize("paused", [False, True])
def test_what_a_window_still_sees_goes_with_the_kv(sides, paused):
    source, target = sides
    kv_tokens = PIECES[-1][1]
    begun, before = target.free, source.pool.windows.before(kv_tokens)
    where = source.pool.take(kv_tokens, source.pool.windows.before(ASKED))
    expected = content(source.scheduler, where, before)
    kept = source.copies.save(request(16), where) if paused else None
    reservation = target.receive_buffer.reserve("m", 0, MOST, source.pool.windows.before(ASKED))
    held = target.pool.in_pages(MOST)
    assert target.reserved == (held, held - reservation.before)
    assert target.free == (begun[0] - held, begun[1] - held + reservation.before)
    assert send(source, target, where, reservation, kept) == before
    got, first = target.receive_buffer.keep(reservation, kv_tokens, before, 1.0)
    assert (len(got), first, target.reserved) == (kv_tokens, before, (0, 0))
    for found, was in zip(content(target.scheduler, got, first), expected, strict=True):
        assert torch.equal(found, was)
    paged = target.pool.in_pages(kv_tokens)
    assert target.free == (begun[0] - paged, begun[1] - paged + first)
    target.pool.give(got, first)
    assert target.free == begun


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_move_that_fails_gives_both_pools_back(sides, pieces):
    source, target = sides
    begun = target.free
    where = source.pool.take(PIECES[-1][1], 0)
    reservation = target.receive_buffer.reserve("m", 0, MOST, source.pool.windows.before(ASKED))
    if pieces:
        send(source, target, where, reservation)
    target.receive_buffer.drop(reservation, "timeout", 1.0)
    assert (target.free, target.reserved) == (begun, (0, 0))


def test_nothing_is_reserved_where_windows_are_short(sides):
    _, target = sides
    whole, windows = target.free
    page = target.pool.in_pages(1)
    assert windows < whole
    assert target.receive_buffer.reserve("m", 0, windows + page, 0) is None
    assert (target.free, target.reserved) == ((whole, windows), (0, 0))
    assert target.receive_buffer.reserve("m", 0, windows + page, page) is not None
    assert target.free == (whole - windows - page, 0)


def test_an_entry_that_was_not_reserved_is_not_read(sides):
    source, target = sides
    reservation = target.receive_buffer.reserve("m", 0, MOST, source.pool.windows.before(ASKED))
    assert not target.receive_buffer.fetch(reservation, 0, 16, reservation.before - 1)


def fail(*_):
    raise ValueError("not there")


@pytest.mark.parametrize("way", ["copy_out", "copy_in"])
@pytest.mark.parametrize("fails", ["the places", "the second copy"])
def test_a_piece_that_fails_between_its_pools_is_not_forgotten_half_way(
    sides, way, fails, monkeypatch
):
    """Memory that a copy under way reads or writes would be given to others."""
    source, begun = sides[0], []
    copy = "read" if way == "copy_out" else "to_device"
    monkeypatch.setattr(source.copies, copy, lambda *both: begun.extend(both))
    if fails == "the places":
        monkeypatch.setattr(source.copies, "window_peers", fail)
    else:
        monkeypatch.setattr(source.copies.windows, copy, fail)
    where = source.pool.take(16, 0)
    memory = memoryview(bytearray(source.kv.size(16, 8)))
    parts = []
    with pytest.raises(ValueError, match="not there"):
        getattr(source.kv, way)(where, 8, memory, parts)
    known = [kv for _, kv in parts]
    assert [each for each in begun if isinstance(each, HostKV)] == known[:1]
    assert bool(known) == (fails == "the second copy")


def test_a_pause_or_return_that_fails_has_begun_no_copy(sides, monkeypatch):
    source, _ = sides
    req, where, room = request(16), source.pool.take(24, 0), source.copies.room
    copy = source.copies.save(req, where)
    begun = []
    for name in ("read", "to_device"):
        monkeypatch.setattr(source.copies, name, lambda *both: begun.append(both))
    monkeypatch.setattr(source.copies._window_pool, "peers", fail)
    left = source.copies.room
    assert left < room
    with pytest.raises(ValueError, match="not there"):
        source.copies.save(req, where)
    with pytest.raises(ValueError, match="not there"):
        source.copies.load(req, copy, where, 0)
    assert (begun, source.copies.room) == ([], left)
