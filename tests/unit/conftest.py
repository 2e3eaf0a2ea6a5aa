"""What several unit tests need."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.engine.tp_ranks import RanksDiverged

here = threading.local()


@pytest.fixture(scope="module")
def engines_end():
    """Mooncake's end with the module: a while later, the thread that happened to find one without
    an owner would stand still for that, in another test."""
    yield
    gc.collect()


@pytest.fixture
def both(monkeypatch):
    """Runs something on two tensor-parallel ranks at a time, which meet as two threads: a function
    of rank and scheduler."""
    met, told, meeting = threading.Barrier(2), threading.Barrier(2), {}

    def all_reduce(tensor, op, group):
        meeting[here.rank] = tensor.clone()
        met.wait(60)
        tensor.copy_(torch.minimum(meeting[0], meeting[1]))
        told.wait(60)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: here.rank)

    def run(work):
        def rank(number):
            here.rank = number
            scheduler = SimpleNamespace(
                attn_tp_cpu_group=SimpleNamespace(size=lambda: 2),
                token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 7),
            )
            try:
                return work(number, scheduler)
            except RanksDiverged as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))

    return run
