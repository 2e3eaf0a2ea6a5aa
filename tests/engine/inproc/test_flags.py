"""SGLang's scheduling flags under a policy that schedules (`scheduling_flags`)."""

import itertools

import pytest

from tests.engine.inproc import watch
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.test_plain import CHAOS, requests

WATCH = "tests.engine.inproc.watch:batches"
POLICY = {"quantum_tokens": 20, "answer_tpot_ms": 40.0}
SHORT = ["--max-total-tokens", "800"]


@pytest.fixture(scope="module")
def stock(tiny_model):
    return run(tiny_model, requests(24))


def test_a_prefill_keeps_sglangs_limits(tiny_model, stock):
    limits = "--chunked-prefill-size 32 --prefill-max-requests 2 --max-running-requests 5".split()
    ours = run(tiny_model, requests(24), POLICY, [*SHORT, *limits], each_pass=WATCH)
    prefills = [line for line in watch.lines(ours) if line["prefill"]]
    assert max(line["tokens"] for line in prefills) <= 32
    assert max(len(line["rids"]) for line in prefills) == 2
    assert max(line["running"] for line in watch.lines(ours)) == 5
    assert differing(ours, stock) == []


@pytest.mark.parametrize(("flags", "decodes"), [([], 1), (["--prefill-decode-interval", "3"], 3)])
def test_prefills_and_decode_steps_take_turns(tiny_model, stock, flags, decodes):
    ours = run(tiny_model, requests(24), POLICY, flags, each_pass=WATCH)
    passes = [line["pass"] for line in watch.lines(ours) if line["prefill"]]
    apart = [later - earlier for earlier, later in itertools.pairwise(passes)]
    assert min(apart) > decodes
    assert differing(ours, stock) == []


def test_a_prefill_waits_for_free_slots(tiny_model, stock):
    flags = "--max-running-requests 4 --min-free-slots-delay 3".split()
    ours = run(tiny_model, requests(24), POLICY, flags, each_pass=WATCH)
    lines = watch.lines(ours)
    # Those that ran in the pass before a prefill go on.
    ran = [
        len(before["rids"])
        for before, line in itertools.pairwise(lines)
        if line["prefill"] and line["pass"] == before["pass"] + 1 and not before["prefill"]
    ]
    assert max(ran) <= 2
    assert differing(ours, stock) == []


@pytest.mark.parametrize(
    "flags",
    [
        "--enable-mixed-chunk --chunked-prefill-size 32",
        "--strip-thinking-cache",
    ],
)
def test_flags_change_no_token_under_pauses(tiny_model, flags):
    thinking = [
        Request(ids=r.ids, params=r.params, options={"require_reasoning": True})
        for r in requests(24)
    ]
    expected = run(tiny_model, thinking)
    ours = run(tiny_model, thinking, CHAOS, [*SHORT, *flags.split()])
    assert differing(ours, expected) == []
    assert min(ours.pauses[tier] for tier in ("resident", "host", "recompute")) > 3
    assert ours.free == ours.capacity


def test_strict_thinking_goes_on_after_a_pause(tiny_model):
    """It gives every request an object that follows its thinking and ends it at a budget."""
    budgets = [
        Request(
            ids=r.ids,
            params={**r.params, "custom_params": {"thinking_budget": 5 + i % 7}},
            options={"require_reasoning": True},
        )
        for i, r in enumerate(requests(24))
    ]
    strict = ["--enable-strict-thinking"]
    grammars = "tests.engine.inproc.watch:grammars"
    expected = run(tiny_model, budgets, flags=strict)
    ours = run(tiny_model, budgets, CHAOS, [*SHORT, *strict], each_pass=grammars)
    assert max(line["grammars"] for line in watch.lines(ours)) == 24
    assert differing(ours, expected) == []
    assert min(ours.pauses[tier] for tier in ("resident", "host", "recompute")) > 3


@pytest.mark.parametrize(("level", "tokens"), [("observe", 4096), ("order", 4096), ("move", 4)])
def test_what_a_prefill_reserves_goes_by_the_level(tiny_model, level, tokens):
    settings = {**POLICY, "most_level": level}
    watching = "tests.engine.inproc.watch:settings"
    ours = run(tiny_model, requests(1), settings, each_pass=watching)
    assert watch.lines(ours) == [{"clip": tokens}]
