"""Generation pauses by retraction, or weights change, while requests are held or move."""

from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.orders import Order
from pascal_sglang.engine.kv.host_copies import HostCopy
from pascal_sglang.engine.retraction import retract_held
from pascal_sglang.policy.kv_tier import Rung
from pascal_sglang.policy.request import Place
from tests.unit import test_arriving, test_move_copies

governor, sides = test_arriving.governor, test_move_copies.sides
OWN = test_arriving.OWN


class Request(SimpleNamespace):
    """Knows whether it ended, and how often its KV was dropped."""

    __hash__ = object.__hash__

    def __init__(self, *, over=False):
        super().__init__(over=over, retractions=0, entered=0)
        self.kv = SimpleNamespace(holds_kv=not over)
        self.time_stats = SimpleNamespace(set_wait_queue_entry_time=self.enter)

    def enter(self):
        self.entered += 1

    def finished(self):
        return self.over

    def reset_for_retract(self):
        self.retractions += 1


@pytest.fixture
def released(governor, monkeypatch):
    """What has been given back to the pool."""
    found, pool = [], governor.ladder.pool
    monkeypatch.setattr(pool, "release", found.append)
    monkeypatch.setattr(pool, "release_rowless", lambda req, locations: found.append(req))
    monkeypatch.setattr(governor, "stopped", lambda req, place: found.append((req, place)))
    governor.scheduler.waiting_queue = []
    return found


def test_everybody_held_waits_without_kv_and_who_was_handed_over_comes_back_only_if_refused(
    governor, released
):
    ladder = governor.ladder
    resident, host, arriving, leaving, ended, handed = (Request() for _ in range(6))
    ended.over = True
    for req in (resident, handed):
        ladder.resident[req] = torch.arange(3)
    ladder.host[host] = HostCopy(10, 0, None, OWN)
    ladder.arriving[arriving] = HostCopy(10, 0, None, OWN)
    ladder.leaving = {leaving: Rung.HOST, ended: None}
    ladder.copying[leaving] = HostCopy(10, 0, None, OWN)
    ladder.host_tokens = 20
    ladder.moving.add(handed)
    assert ladder.held() == {resident, host, arriving, leaving, ended, handed}
    retract_held(governor)
    waiting = [resident, host, arriving, leaving]
    assert governor.scheduler.waiting_queue == waiting
    assert [r for r in released if isinstance(r, tuple)] == [(r, Place.WAITING) for r in waiting]
    assert {r for r in released if not isinstance(r, tuple)} == {
        resident,
        handed,
        arriving,
        leaving,
    }
    assert ladder.is_empty()
    assert (ladder.host_tokens, ladder.copying) == (0, {})
    assert ladder.copies.held == [OWN], "who gets its memory waits for the copy"
    assert [r.retractions for r in (*waiting, handed, ended)] == [1, 1, 1, 1, 1, 0]
    # A second time there is nothing to drop.
    retract_held(governor)
    assert handed.retractions == 1
    assert ladder.held() == {handed}


def handed_over(source, target):
    """The move's request, and its Handover, which the target has not read."""
    source.step()
    target.arrivals.hear(0, *source.take(messages.Chunk), 1.0)
    target.step()
    (request,) = source.scheduler.running_batch.reqs
    source.departures.hear(1, *target.take(messages.Got), 1.0)
    source.step()
    (handover,) = source.take(messages.Handover)
    return request, handover


def test_a_target_that_pauses_refuses_and_the_source_has_dropped_the_kv(sides):
    source, target = sides
    request, handover = handed_over(source, target)
    waiting = []
    source.governor.scheduler = SimpleNamespace(waiting_queue=waiting)
    request.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
    source.departures.give_up("generation paused")
    assert source.departures.under_way, "it may be the target's"
    source.ladder.moving.add(request)
    source.ladder.resident.clear()
    target.arrivals.give_up("generation paused")
    assert not target.arrivals.under_way
    assert target.landing.reserved == 0
    target.arrivals.hear(0, handover, 1.0)
    assert target.take(messages.Mine) == []
    source.departures.hear(1, target.take(messages.Refused)[0], 1.0)
    assert source.departures.counts == {"kept:generation paused": 1}
    assert source.said[-1].why == "generation paused"
    assert ("stopped", Place.WAITING) in source.said
    assert waiting == [request]
    assert not source.ladder.moving


def test_who_is_not_handed_over_stays(sides):
    source, target = sides
    source.departures.give_up("weights changed")
    assert source.copies.under_way == []
    assert source.take(messages.Cancelled) == [messages.Cancelled("m")]
    assert source.departures.counts == {"kept:weights changed": 1}
    target.arrivals.give_up("weights changed")
    assert target.arrivals.counts == {"weights changed": 1}


@pytest.mark.parametrize("paused", [True, False])
def test_no_move_begins_while_generation_is_paused_or_between_other_weights(paused, sides):
    source, target = sides
    ask = messages.Ask("n", "other", 10, target.kv.layout)
    if paused:
        source.scheduler._engine_paused = target.scheduler._engine_paused = True
        source.departures.ordered(Order("n", "r", 1), 1.0)
        assert source.take(messages.Ask) == []
        assert source.departures.under_way.keys() == {"m"}
    else:
        target.kv._weights = lambda: "second"
    target.arrivals.asked(0, ask, 1.0)
    (refused,) = target.take(messages.Refused)
    expected = "generation paused" if paused else "another KV layout or other weights"
    assert refused.why == expected
