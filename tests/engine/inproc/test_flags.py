"""SGLang's scheduling flags under a policy that schedules (`scheduling_flags`)."""

import itertools

from tests.engine.inproc import watch
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import WATCH, since
from tests.engine.inproc.test_plain import CHAOS, requests

POLICY = {"quantum_tokens": 20, "answer_tpot_ms": 40.0}
TIGHT = ["--max-total-tokens", "800"]


def test_a_prefill_keeps_sglangs_limits(tiny_model, stock):
    limits = (
        "--chunked-prefill-size 32 --prefill-max-requests 2 --max-running-requests 5 "
        "--prefill-decode-interval 3"
    )
    ours = run(tiny_model, requests(24), POLICY, [*TIGHT, *limits.split()], each_pass=WATCH)
    lines = watch.lines(ours)
    prefills = [line for line in lines if line["prefill"]]
    assert max(line["tokens"] for line in prefills) <= 32
    assert max(len(line["rids"]) for line in prefills) == 2
    assert max(line["running"] for line in lines) == 5
    assert min(passes_apart(prefills)) > 3
    assert differing(ours, stock) == []


@since("0.5.23", "an interval is for batches of any size there")
def test_an_interval_is_for_large_batches_and_a_reserve_that_is_given_stays(tiny_model, stock):
    limits = (
        "--chunked-prefill-size 64 --max-prefill-tokens 8 --max-running-requests 5 "
        "--prefill-decode-interval 3 --prefill-decode-interval-min-bs 99"
    )
    # SGLang has read it on import; ours reads it where it would set another one.
    reserve = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4096"}
    flags = [*TIGHT, *limits.split()]
    ours = run(tiny_model, requests(24), POLICY, flags, each_pass=WATCH, **reserve)
    lines = watch.lines(ours)
    prefills = [line for line in lines if line["prefill"]]
    # No prompt is shorter.
    assert max(len(line["rids"]) for line in prefills) == 1
    assert min(passes_apart(prefills)) == 1
    assert {line["reserved"] for line in lines} == {4096}
    assert differing(ours, stock) == []


def test_a_prefill_is_delayed(tiny_model, stock):
    delayer = (
        "--enable-prefill-delayer --prefill-delayer-max-delay-passes 4 --max-running-requests 6 "
        "--prefill-delayer-token-usage-low-watermark 0.01 --prefill-delayer-queue-min-ratio 0.9 "
        "--prefill-delayer-max-delay-ms 100000"
    )
    ours = run(tiny_model, requests(24), POLICY, [*TIGHT, *delayer.split()], each_pass=WATCH)
    assert max(line["delayed"] for line in watch.lines(ours)) == 3
    assert differing(ours, stock) == []
    assert ours.free == ours.capacity


def passes_apart(lines):
    return [later["pass"] - line["pass"] for line, later in itertools.pairwise(lines)]


def test_a_prefill_waits_for_free_slots(tiny_model, stock):
    flags = "--max-running-requests 4 --min-free-slots-delay 3".split()
    ours = run(tiny_model, requests(24), POLICY, [*TIGHT, *flags], each_pass=WATCH)
    lines = watch.lines(ours)
    ran = [
        line["running"]
        for before, line in itertools.pairwise(lines)
        if line["prefill"] and not before["prefill"]
    ]
    assert max(ran) <= 1
    assert min(passes_apart([line for line in lines if line["prefill"]])) > 1, "they take turns"
    assert differing(ours, stock) == []


def tiles(scheduler, reqs, passes):
    """As by a `SGLANG_PREFILL_TILE_BUDGET` of less than any prompt on an AMD GPU: a prefill takes
    one request."""
    from sglang.srt.managers import schedule_policy

    if passes == 1:
        schedule_policy._IS_HIP = True
        schedule_policy.PREFILL_TILE_BUDGET = 0.5
        check = schedule_policy.PrefillAdder._check_prefill_tile_budget

        def said(adder, tokens):
            if found := check(adder, tokens):
                print("TOO MANY TILES")
            return found

        schedule_policy.PrefillAdder._check_prefill_tile_budget = said


def test_flags_change_no_token_under_pauses(tiny_model, stock):
    thinking = [
        Request(ids=r.ids, params=r.params, options={"require_reasoning": True})
        for r in requests(24)
    ]
    flags = "--enable-mixed-chunk --chunked-prefill-size 32 --strip-thinking-cache"
    hook = {"each_pass": f"{__name__}:{tiles.__name__}"}
    ours = run(tiny_model, thinking, CHAOS, [*TIGHT, *flags.split()], **hook)
    assert "TOO MANY TILES" in ours.log
    assert differing(ours, stock) == []
    assert min(ours.pauses[tier] for tier in ("resident", "host", "recompute")) > 3
    assert ours.free == ours.capacity
