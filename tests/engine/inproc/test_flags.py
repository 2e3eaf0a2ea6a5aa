"""SGLang's scheduling flags under a policy that schedules (`scheduling_flags`)."""

import itertools

from tests.engine.inproc import watch
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import WATCH
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


def test_flags_change_no_token_under_pauses(tiny_model, stock):
    thinking = [
        Request(ids=r.ids, params=r.params, options={"require_reasoning": True})
        for r in requests(24)
    ]
    flags = "--enable-mixed-chunk --chunked-prefill-size 32 --strip-thinking-cache"
    ours = run(tiny_model, thinking, CHAOS, [*TIGHT, *flags.split()])
    assert differing(ours, stock) == []
    assert min(ours.pauses[tier] for tier in ("resident", "host", "recompute")) > 3
    assert ours.free == ours.capacity
