"""A device that is as late as CUDA allows, and one that fails besides: moves, pauses and spills
change no token, lose no request and leave nothing behind."""

import pytest

from tests.engine.inproc import late, loopback
from tests.engine.inproc.bed import differing, run
from tests.engine.inproc.conftest import LATE_DEVICE
from tests.engine.inproc.test_plain import CHAOS, requests

pytestmark = LATE_DEVICE

MOVING = {**CHAOS, "migration": "always"}


@pytest.fixture(scope="module")
def stock(tiny_model):
    return run(tiny_model, requests(40), flags=["--max-total-tokens", "8192"])


def assert_nothing_shows(outcome, stock):
    assert differing(outcome, stock) == []
    assert (outcome.status["policy_errors"], outcome.status["queue_errors"]) == (0, 0)
    assert outcome.free == outcome.capacity
    assert outcome.status["kv_tokens"]["host"] == 0
    assert min(outcome.pauses[tier] for tier in ("resident", "host", "recompute")) > 5


def test_spills_and_moves_change_no_token(tiny_model, stock):
    flags = ["--max-total-tokens", "1200"]
    moved = run(tiny_model, requests(40), MOVING, flags, **late.MOVES)
    assert_nothing_shows(moved, stock)
    loopback.assert_moved(moved)
    assert moved.pauses["spilled"] > 0


def test_copies_that_fail_and_memory_that_is_not_pinned_lose_no_request(tiny_model, stock):
    flags = ["--max-total-tokens", "1200"]
    moved = run(tiny_model, requests(40), MOVING, flags, **late.FAILING_MOVES)
    assert_nothing_shows(moved, stock)
    assert moved.pauses["copy_failed"] > 3
    migrations = moved.status["migrations"]
    assert migrations["outgoing"]["moved"] == migrations["incoming"]["taken"] > 5
    assert migrations["outgoing"]["kept:transport"] > 0
    assert "cannot pin" in moved.log
