"""MLA (DeepSeek-V3): pauses on every tier change no token, with cached prefixes and chunks."""

import pytest

from tests.engine.inproc import models
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import PAGES

CHAOS = {"chaos": 0.08, "quantum_tokens": 50, "answer_tpot_ms": 40.0}


def requests(count):
    """Half of them with a common beginning."""
    shared = [97 + i % 26 for i in range(48)]
    return [
        Request(
            ids=[*shared[: 48 * (i % 2)], *(97 + (7 * i + j) % 26 for j in range(8 + 9 * (i % 5)))],
            params={"max_new_tokens": 25 + 10 * (i % 4)},
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.build("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))


@pytest.fixture(scope="module")
def stock(model):
    return run(model, requests(24), flags=["--max-total-tokens", "8192"])


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--chunked-prefill-size", "32"), id="chunks"),
        pytest.param(("--page-size", "16", "--disable-overlap-schedule"), id="pages", marks=PAGES),
    ],
)
def test_pauses_change_no_token(model, stock, flags):
    paused = run(model, requests(24), CHAOS, ["--max-total-tokens", "1280", *flags])
    assert paused.kinds["pool"] == "MLATokenToKVPool"
    assert differing(paused, stock) == []
    assert min(paused.pauses[tier] for tier in ("resident", "host", "recompute")) > 5
    assert (paused.status["policy_errors"], paused.status["queue_errors"]) == (0, 0)
    assert paused.free == paused.capacity
