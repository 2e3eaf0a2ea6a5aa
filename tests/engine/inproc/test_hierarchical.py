"""The hierarchical cache: a pause leaves to its host pool what that has, and loads come back."""

import itertools

import pytest

from tests.engine.inproc.bed import Request, run
from tests.engine.inproc.conftest import HOST_POOL, PAGES

pytestmark = HOST_POOL
CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
FLAGS = "--enable-hierarchical-cache --hicache-io-backend direct --hicache-ratio 8".split()
COUNT, PROMPTS = 64, 32


def requests():
    """Prompts that come again, and do not fit on the device together."""
    return [
        Request(
            ids=[
                97 + (7 * (i % PROMPTS) + j * (1 + i % PROMPTS) + j * j * (i % 2)) % 26
                for j in range(100)
            ]
            + [97 + i % 26] * (i % 5),
            params={"max_new_tokens": 20 + 5 * (i % 4)},
        )
        for i in range(COUNT)
    ]


def watch(scheduler, reqs, passes):
    """Every tenth prefix is found lost. Once nothing runs, nothing keeps a prefix from being
    evicted, on the device and off it."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    if passes == 1:
        pool, looks = scheduler.plan_executor.pool, itertools.count(1)
        caches = pool.caches
        pool.caches = lambda *prefix: next(looks) % 10 != 0 and caches(*prefix)
    if len(reqs) == COUNT and scheduler.is_fully_idle():
        tree = scheduler.tree_cache
        tree.evict(EvictParams(num_tokens=scheduler.max_total_num_tokens))
        pool = tree.cache_controller.mem_pool_host
        assert pool.available_size() < pool.logical_size
        tree.evict_host(pool.logical_size)
        assert pool.available_size() == pool.logical_size


@pytest.fixture(scope="module")
def stock(tiny_model):
    return run(tiny_model, requests(), flags=["--max-total-tokens", "8192"])


@pytest.mark.parametrize(
    "flags",
    [
        "--hicache-mem-layout layer_first --max-total-tokens 700",
        pytest.param(
            "--hicache-mem-layout page_first_direct --page-size 16 --max-total-tokens 704",
            marks=PAGES,
        ),
    ],
)
def test_pauses_leave_prefixes_to_the_host_pool(tiny_model, stock, flags):
    flags = [*FLAGS, *flags.split()]
    paused = run(tiny_model, requests(), CHAOS, flags, each_pass=f"{__name__}:{watch.__name__}")
    assert paused.outputs == stock.outputs
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert paused.status["policy_errors"] == 0
    assert paused.free == paused.capacity
    # Of paused requests, which were loaded back; and of prompts that came again.
    assert paused.pauses["held_tokens"] > paused.pauses["host_tokens"] / 2
    assert min(paused.pauses[count] for count in ("loaded_prefixes", "lost_prefixes")) > 5
    assert sum(hit > 0 for hit in paused.loaded) > 5
