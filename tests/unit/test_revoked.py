"""A request that its source has ended leaves nothing here, and no word of it."""

from types import SimpleNamespace

import pytest

from pascal_sglang.engine.migration.revoked import Revoked
from pascal_sglang.engine.observability.phases import PhaseTracker


class Request:
    to_finish = finished_output = None
    over = False

    def finished(self):
        return self.over


@pytest.fixture
def revoked():
    gone = []
    paused_requests = SimpleNamespace(
        held=[], forget=lambda matches: [r for r in paused_requests.held if matches(r)]
    )
    scheduler = SimpleNamespace(waiting_queue=[], _release_aborted_request=gone.append)
    pass_info = SimpleNamespace(now=2.0)
    states = SimpleNamespace(
        paused_requests=paused_requests, ended=gone.append, pass_info=pass_info
    )
    scheduler.gone = gone
    return Revoked(scheduler=scheduler, states=states)


@pytest.mark.parametrize("where", ["waiting", "held"])
def test_one_that_does_not_run_is_gone_at_once(where, revoked):
    req, other = Request(), Request()
    waiting, held = revoked.scheduler.waiting_queue, revoked.states.paused_requests.held
    (waiting if where == "waiting" else held).append(req)
    waiting.append(other)
    revoked.add(req)
    assert revoked.scheduler.gone == [req, req]
    assert waiting == [other]
    assert not revoked


def test_one_that_runs_ends_with_its_next_result_and_says_nothing(revoked):
    req, other = Request(), Request()
    revoked.add(req)
    assert (req.to_finish is not None, revoked.scheduler.gone, bool(revoked)) == (True, [], True)
    assert revoked.without([req, other]) == [other]
    req.over = True
    assert revoked.without([other, req]) == [other]
    assert req.finished_output
    assert not revoked
    # Under overlap the step in flight brings it up once more.
    tracker = PhaseTracker(None)
    tracker.observe([req], 3.0)
    assert tracker.outcomes == {}
