"""A pool with sliding windows (gpt-oss): pauses on every tier change no token."""

import pytest

from tests.engine.inproc import late, loopback, models
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import HYBRID_POOLS, LATE_DEVICE, is_before

pytestmark = HYBRID_POOLS
CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}
# Entries leave a window while a request runs: SGLang frees them by 128 otherwise.
INTERVAL = {"SGLANG_SWA_EVICTION_INTERVAL": "8"}
# Where a window is no multiple of a page, SGLang counts KV twice before 0.5.23.
PAGES = ("--page-size", "8" if is_before("0.5.23") else "16")


def requests(count):
    """Prompts shorter and longer than a window, half of them with a common beginning."""
    shared = [97 + i % 26 for i in range(2 * models.WINDOW)]
    return [
        Request(
            ids=[*shared[: 48 * (i % 2)], *(97 + (7 * i + j) % 26 for j in range(8 + 9 * (i % 5)))],
            params={"max_new_tokens": 25 + 10 * (i % 4)},
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.build("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def stock(model):
    flags = [*models.FLAGS["gpt_oss"], "--max-total-tokens", "8192"]
    return run(model, requests(24), flags=flags, **INTERVAL)


def chaos(model, stock, *flags, each_pass=None):
    flags = (*models.FLAGS["gpt_oss"], "--max-total-tokens", "1280", *flags)
    paused = run(model, requests(24), CHAOS, flags, each_pass=each_pass, **INTERVAL)
    assert paused.kinds["allocator"] == "SWATokenToKVPoolAllocator"
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert (paused.status["policy_errors"], paused.status["queue_errors"]) == (0, 0)
    assert paused.free == paused.capacity
    return paused


@pytest.mark.parametrize(
    "flags",
    [
        (),
        PAGES,
        ("--disable-overlap-schedule", "--chunked-prefill-size", "32"),
        # The windows are the scarce pool.
        ("--max-total-tokens", "2048", "--swa-full-tokens-ratio", "0.25"),
        ("--disable-radix-cache", *PAGES),
    ],
    ids=["overlap", "pages", "chunks", "few", "no cache"],
)
def test_pauses_change_no_token(model, stock, flags):
    chaos(model, stock, *flags)


def test_windows_are_a_capacity_of_their_own(model, stock):
    """Three requests' windows fill the pool: all that is given up is given up by the plan."""
    flags = [*models.FLAGS["gpt_oss"], "--max-total-tokens", "1024"]
    flags += ["--swa-full-tokens-ratio", "0.125"]
    settings = {"quantum_tokens": 50, "host_kv_gb": 0.05}
    crowded = run(model, requests(24), settings, flags, **INTERVAL)
    assert differing(crowded, stock) == []
    assert crowded.pauses["host"] > 5
    assert not crowded.pauses.get("recompute")
    windows = crowded.status["windows"]
    assert windows["free"] == windows["capacity"] == 128
    assert (crowded.status["policy_errors"], crowded.free) == (0, crowded.capacity)


def copies_of_the_pool(scheduler, reqs, passes):
    """SGLang's own copies, to which ours are compared."""
    from pascal_sglang.engine.kv.pool_copies import PoolCopies

    if passes == 1:
        copies = scheduler.plan_executor.paused_requests.copies = PoolCopies(scheduler)
        copies.reserve(4096)


def test_copies_by_the_pools_own_code_change_no_token(model, stock):
    each_pass = "tests.engine.inproc.test_windows:copies_of_the_pool"
    paused = chaos(model, stock, *PAGES, each_pass=each_pass)
    assert paused.status["kv_tokens"]["host"] == 0


@pytest.mark.parametrize(
    ("settings", "flags", "hooks"),
    [
        pytest.param({}, (), late.MOVES, id="live, late device", marks=LATE_DEVICE),
        pytest.param(
            {"live_migration": False},
            ("--disable-overlap-schedule", *PAGES),
            loopback.HOOKS,
            id="stopped",
        ),
    ],
)
def test_moves_change_no_token(model, stock, settings, flags, hooks):
    """The live tail of a window goes with the KV, and the windows of both sides all come back."""
    settings = {**CHAOS, "migration": "always", **settings}
    flags = (*models.FLAGS["gpt_oss"], "--max-total-tokens", "2048", *flags)
    moved = run(
        model,
        requests(24),
        settings,
        flags,
        **hooks,
        **INTERVAL,
    )
    assert moved.status["support"] == {"level": "move", "lowered_by": []}
    assert differing(moved, stock) == []
    loopback.assert_moved(moved)
    assert min(moved.pauses[tier] for tier in ("resident", "host", "recompute")) > 2
    windows = moved.status["windows"]
    assert windows["free"] == windows["capacity"]
    assert (moved.status["policy_errors"], moved.free) == (0, moved.capacity)
