"""Two pipeline stages in two processes: each plans for itself, and both plan alike."""

from tests.engine.inproc import watch
from tests.engine.inproc.bed import Request, differing, run, run_stages
from tests.engine.inproc.conftest import WATCH
from tests.engine.inproc.test_plain import requests

# Requests of better priority, which come last of each four.
HASTY = range(3, 24, 4)
FLAGS = ["--max-total-tokens", "2048", "--max-running-requests", "4"]


def first_passes(outcome):
    """The pass in which each request ran first."""
    found = {}
    for line in watch.lines(outcome):
        for rid in line["rids"]:
            found.setdefault(int(rid[1:]), line["pass"])
    return [found[i] for i in range(len(found))]


def test_two_stages_start_requests_in_our_order_and_change_no_token(tiny_model):
    """By chance, requests wait for a pass longer: what one stage decides the other one has to."""
    asked = [
        Request(
            ids=each.ids,
            params={**each.params, "presence_penalty": 1.2 * (i % 5 == 0)},
            options={"priority": 20 * (i in HASTY)},
        )
        for i, each in enumerate(requests(24))
    ]
    one = run(tiny_model, asked, flags=[*FLAGS, "--disable-overlap-schedule"], each_pass=WATCH)
    settings = {"chaos": 0.2, "quantum_tokens": 50}
    by_priority = [*FLAGS, "--enable-priority-scheduling"]
    stages = run_stages(tiny_model, asked, settings, by_priority, each_pass=WATCH)
    for stage in stages:
        support = {"level": "order", "lowered_by": ["--pp-size above 1"]}
        assert stage.status["support"] == support
        assert differing(stage, one) == []
        assert (stage.status["policy_errors"], stage.status["queue_errors"]) == (0, 0)
        assert not any(stage.pauses.values())
        assert stage.free == stage.capacity
    assert first_passes(one) == sorted(first_passes(one))
    first, second = map(first_passes, stages)
    assert first == second
    hasty = sum(first[i] for i in HASTY) / len(HASTY)
    assert hasty < sum(first) / len(first)
