"""What each level does on a real scheduler: nothing, our order, pauses that drop KV."""

from tests.engine.inproc import watch
from tests.engine.inproc.bed import Request, differing, run
from tests.engine.inproc.conftest import SHORT, WATCH
from tests.engine.inproc.test_plain import CHAOS, requests


def test_what_is_only_observed_runs_pass_by_pass_as_in_sglang(tiny_model, stock):
    settings = {**CHAOS, "most_level": "observe"}
    seen = run(tiny_model, requests(24), settings, SHORT, each_pass=WATCH)
    assert seen.kinds["scheduler"] == "PascalScheduler"
    assert seen.status["support"] == {"level": "observe", "lowered_by": ["a test"]}
    assert any(line["waiting"] for line in watch.lines(stock)), "memory was not short"
    assert watch.lines(seen) == watch.lines(stock)
    assert differing(seen, stock) == []
    assert sum(seen.status["ended"].values()) == 24


def test_in_our_order_sglang_retracts_and_nothing_is_paused(tiny_model, stock):
    asked = requests(24)
    hasty = range(3, 24, 4)
    asked = [
        Request(ids=r.ids, params=r.params, options={"priority": 20 if i in hasty else 0})
        for i, r in enumerate(asked)
    ]
    settings = {**CHAOS, "most_level": "order"}
    flags = [*SHORT, "--enable-priority-scheduling", "--max-running-requests", "4"]
    retracting = "tests.engine.inproc.watch:retracting"
    ours = run(tiny_model, asked, settings, flags, each_pass=retracting)
    assert ours.status["support"] == {"level": "order", "lowered_by": ["a test"]}
    assert differing(ours, stock) == []
    assert not any(ours.pauses.values())
    assert not any(name.startswith("pause:") for name in ours.status["decisions"])
    assert ours.status["unpausable"] == {"a test": 24}
    assert (ours.status["policy_errors"], ours.status["queue_errors"]) == (0, 0)
    assert "Testing retraction" in ours.log
    assert ours.free == ours.capacity
    assert {line["reserved"] for line in watch.lines(ours)} == {4096}
    first = {}
    for line in watch.lines(ours):
        for rid in line["rids"]:
            first.setdefault(int(rid[1:]), line["pass"])
    mean_hasty = sum(first[i] for i in hasty) / len(hasty)
    others = [first[i] for i in range(24) if i not in hasty]
    assert mean_hasty < sum(others) / len(others)


def test_a_pause_that_drops_its_kv_changes_no_token(tiny_model, stock):
    settings = {**CHAOS, "most_level": "recompute"}
    paused = run(tiny_model, requests(24), settings, SHORT, each_pass=WATCH)
    assert paused.status["support"] == {"level": "recompute", "lowered_by": ["a test"]}
    assert differing(paused, stock) == []
    assert paused.pauses["recompute"] > 5
    assert not {"resident", "host", "spilled"} & paused.pauses.keys()
    assert paused.status["kv_tokens"]["host"] == 0
    assert {line["reserved"] for line in watch.lines(paused)} == {4}
    assert paused.status["policy_errors"] == 0
    assert paused.free == paused.capacity


def test_a_retraction_of_sglangs_own_is_survived(tiny_model, stock):
    """Requests that it retracts in every third step come back through our queue, and none is
    lost among those that are paused."""
    retracting = "tests.engine.inproc.watch:retracting"
    flags = ["--max-total-tokens", "1500"]
    ours = run(tiny_model, requests(24), {"quantum_tokens": 10}, flags, each_pass=retracting)
    assert ours.status["support"]["level"] == "pause"
    assert differing(ours, stock) == []
    assert ours.log.count("Testing retraction") > 5
    assert (ours.status["policy_errors"], ours.status["queue_errors"]) == (0, 0)
    assert ours.free == ours.capacity
