"""Kernels that copy entries of all layers by one launch: each entry to its place and nothing else,
and none is used that does not do so. SGLang's runs on CUDA alone: a stand-in moves the bytes that
it was told to."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from pascal_sglang.engine.kv import entry_kernels, host_copies
from pascal_sglang.engine.kv.entry_kernels import kernel_for
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.triton_copy import _copy
from tests.unit.test_host_copies import copies_of, pool_of


def move_bytes(sources, targets, source_places, target_places, size, buffers):
    """`transfer_kv_all_layer_mla`, by addresses."""
    assert sources.dtype == targets.dtype == torch.uint64
    assert source_places.dtype == target_places.dtype == torch.int64
    assert len(sources) == len(targets) == buffers
    assert len(source_places) == len(target_places)
    places = list(zip(source_places.tolist(), target_places.tolist(), strict=True))
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for first, second in places:
            ctypes.memmove(target + second * size, source + first * size, size)


@pytest.fixture
def pinned(monkeypatch):
    """Copies of a pool on a device that reads and writes host memory by itself, and the launches
    so far."""
    launched = []

    def launch(*arguments):
        launched.append(arguments[-1])
        move_bytes(*arguments)

    monkeypatch.setattr(entry_kernels, "launches", lambda: iter([("a stand-in", launch)]))
    monkeypatch.setattr(host_copies, "pin", lambda at, size: 0)

    def made(kind):
        sound = HostCopies.__init__

        def init(copies, scheduler):
            sound(copies, scheduler)
            copies._pins = True

        monkeypatch.setattr(HostCopies, "__init__", init)
        copies, _ = copies_of(pool_of(kind))
        assert copies._kernel is not None
        launched.clear()
        return SimpleNamespace(copies=copies, launched=launched)

    return made


@pytest.mark.parametrize(("kind", "sizes"), [(MHATokenToKVPool, 2), (MLATokenToKVPool, 1)])
def test_all_layers_go_by_a_launch_per_size_of_entry(pinned, kind, sizes):
    """Also where host memory lies scattered, and where it is not the copies' own."""
    made = pinned(kind)
    copies = made.copies
    kept = [copies.to_host(torch.arange(4 * i, 4 * i + 4)) for i in range(24)]
    for each in kept[::2]:
        copies.free(each)
    made.launched.clear()
    source, target = torch.tensor([5, 3, 40, 41, 90, 7]), torch.tensor([1, 2, 80, 7, 6, 5])
    before = [buffer.clone() for buffer in copies.buffers]
    kv = copies.to_host(source.to(torch.int32))
    assert len(kv.ranges) > 1
    assert len(made.launched) == sizes
    assert sum(made.launched) == len(copies.buffers)
    blocks = [torch.zeros(6, *buffer.shape[1:]) for buffer in copies.buffers]
    copies.read(source, HostKV(blocks, pinned=True))
    assert len(made.launched) == 2 * sizes
    copies.read(source, HostKV([b.clone() for b in blocks]))
    assert len(made.launched) == 2 * sizes, "that memory is not pinned"
    copies.to_device(kv, target)
    assert len(made.launched) == 3 * sizes
    for buffer, was, block in zip(copies.buffers, before, blocks, strict=True):
        was[target] = was[source]
        assert torch.equal(buffer, was)
        assert torch.equal(block, was[target])


def test_a_kernel_that_copies_nothing_is_not_used_and_the_pool_is_as_it_was(monkeypatch):
    pool, memory = [torch.rand(8, 4)], [torch.rand(8, 4)]
    before = pool[0].clone(), memory[0].clone()

    def fails(*_):
        raise RuntimeError("no such symbol")

    def one_way(sources, targets, *rest):
        if int(targets[0]) == memory[0].data_ptr():
            move_bytes(sources, targets, *rest)

    kernels = [("nothing", lambda *_: None), ("none", fails), ("half", one_way)]
    monkeypatch.setattr(entry_kernels, "launches", lambda: iter(kernels))
    assert kernel_for(pool, memory) is None
    kernels.append(("a stand-in", move_bytes))
    assert kernel_for(pool, memory) is not None
    assert all(map(torch.equal, (*pool, *memory), before))


def test_entries_that_are_no_whole_words_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(entry_kernels, "launches", lambda: iter([("a stand-in", move_bytes)]))
    odd = [torch.zeros(8, 3, dtype=torch.uint8)]
    assert kernel_for(odd, odd) is None
    apart = [torch.zeros(8, 8)[:, :4]]
    assert kernel_for(apart, [torch.zeros(8, 4)]) is None


INTERPRETED = """
import torch
from pascal_sglang.engine.kv.entry_kernels import EntryKernel, kernel_for, launches
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.triton_copy import copy_entries
pool = [torch.rand(20, 3, 100), torch.rand(20, 6), torch.rand(20, 3, 100)]
memory = [torch.zeros_like(buffer) for buffer in pool]
kernel = EntryKernel(copy_entries, pool, memory)
where = torch.tensor([7, 3, 19, 4, 11])
kernel.copy_out(HostKV(memory, ranges=[(9, 12), (2, 4)]), where)
for buffer, part in zip(pool, memory):
    expected = torch.zeros_like(part)
    expected[torch.tensor([9, 10, 11, 2, 3])] = buffer[where]
    assert torch.equal(part, expected)
before = [buffer.clone() for buffer in pool]
kernel.copy_in(HostKV(memory, ranges=[(2, 4), (9, 10)]), torch.tensor([0, 1, 19]))
for buffer, was, part in zip(pool, before, memory):
    was[torch.tensor([0, 1, 19])] = part[torch.tensor([2, 3, 9])]
    assert torch.equal(buffer, was)
assert "Triton" in dict(launches())
"""


def test_the_kernel_in_triton_as_its_interpreter_runs_it():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=env, check=True, timeout=300)


def test_the_kernel_in_triton_has_one_form_whatever_is_copied():
    """Another one would be compiled while requests are served."""
    found = {param.name: param for param in _copy.params}
    assert found["entries"].do_not_specialize
    for places in ("source_places", "target_places"):
        assert found[places].do_not_specialize_on_alignment


def test_whatever_a_kernel_raises_is_a_copy_that_failed(pinned, caplog):
    copies, room = (made := pinned(MHATokenToKVPool)).copies, made.copies.room
    where = torch.arange(4)
    kept = copies.to_host(where)

    def fails(*_):
        raise TypeError("not so")

    copies._kernel._launch = fails
    kv = copies.to_host(where)
    copies.to_device(kept, where)
    assert not copies.wait(kv)
    assert not copies.wait(kept)
    assert "not so" in caplog.text
    copies.free(kv)
    copies.free(kept)
    assert copies.room == room
