"""Generation pauses by retraction, or weights change, while requests are held or move."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.messages import MigrateCommand
from pascal_sglang.engine.kv.host_copies import HostCopy
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.engine.request_states import RequestStates
from pascal_sglang.policy.request import RequestStatus
from tests.unit import test_arriving, test_migration_copies

executor = test_arriving.executor
pair, sides = test_migration_copies.pair, test_migration_copies.sides
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
def released(executor, monkeypatch):
    """What has been given back to the pool."""
    found, pool = [], executor.paused_requests.pool
    monkeypatch.setattr(pool, "release", found.append)
    monkeypatch.setattr(pool, "release_rowless", lambda req, locations: found.append(req))
    monkeypatch.setattr(
        executor.request_states, "stopped", lambda req, status: found.append((req, status))
    )
    executor.scheduler.waiting_queue = []
    return found


def test_everybody_held_waits_without_kv_and_who_was_handed_over_comes_back_only_if_refused(
    executor, released
):
    paused_requests = executor.paused_requests
    resident, host, arriving, leaving, ended, handed = (Request() for _ in range(6))
    ended.over = True
    for req in (resident, handed):
        paused_requests._enter(req, PauseStatus.RESIDENT, locations=torch.arange(3))
    for req, status in (
        (host, PauseStatus.HOST),
        (arriving, PauseStatus.ARRIVING),
        (leaving, PauseStatus.LEAVING),
    ):
        paused_requests._enter(req, status, copy=HostCopy(10, 0, None, OWN))
    paused_requests._enter(ended, PauseStatus.LEAVING)
    paused_requests.host_tokens = 20
    paused_requests.begin_migration(handed)
    assert paused_requests.held() == {resident, host, arriving, leaving, ended, handed}
    executor.request_states.retract_held()
    waiting = [resident, host, arriving, leaving]
    assert executor.scheduler.waiting_queue == waiting
    assert [r for r in released if isinstance(r, tuple)] == [
        (r, RequestStatus.WAITING) for r in waiting
    ]
    assert {r for r in released if not isinstance(r, tuple)} == {
        resident,
        handed,
        arriving,
        leaving,
    }
    assert paused_requests.is_empty()
    assert paused_requests.host_tokens == 0
    assert paused_requests.copies.held == [OWN], "who gets its memory waits for the copy"
    assert [r.retractions for r in (*waiting, handed, ended)] == [1, 1, 1, 1, 1, 0]
    # A second time there is nothing to drop.
    executor.request_states.retract_held()
    assert handed.retractions == 1
    assert paused_requests.held() == {handed}
    paused_requests.end_migration(handed)
    assert paused_requests.held() == set()


def handed_over(source, target):
    """The move's request, and its Handover, which the target has not read."""
    source.step()
    target.incoming_migrations.hear(0, *source.take(messages.KVChunk), 1.0)
    target.step()
    (request,) = source.scheduler.running_batch.reqs
    source.outgoing_migrations.hear(1, *target.take(messages.ChunkAck), 1.0)
    source.step()
    (handover,) = source.take(messages.Handover)
    return request, handover


def test_a_target_that_pauses_refuses_and_the_source_has_dropped_the_kv(sides):
    source, target = sides
    request, handover = handed_over(source, target)
    waiting = []
    source.states.scheduler = SimpleNamespace(waiting_queue=waiting)
    source.states.wait_again = partial(RequestStates.wait_again, source.states)
    request.time_stats = SimpleNamespace(
        **vars(request.time_stats), set_wait_queue_entry_time=lambda: None
    )
    source.outgoing_migrations.give_up("generation paused")
    assert source.outgoing_migrations.under_way, "it may be the target's"
    assert source.paused_requests.drop() == [request]
    target.incoming_migrations.give_up("generation paused")
    assert not target.incoming_migrations.under_way
    assert target.receive_buffer.reserved == 0
    target.incoming_migrations.hear(0, handover, 1.0)
    assert target.take(messages.CommitAck) == []
    source.outgoing_migrations.hear(1, target.take(messages.ReserveRefused)[0], 1.0)
    assert source.outgoing_migrations.counts == {"kept:generation paused": 1}
    assert source.said[-1].why == "generation paused"
    assert ("stopped", RequestStatus.WAITING) in source.said
    assert waiting == [request]
    assert source.paused_requests.held() == set()


def test_who_is_not_handed_over_stays(sides):
    source, target = sides
    source.outgoing_migrations.give_up("weights changed")
    assert source.copies.under_way == []
    assert source.take(messages.MigrationCancelled) == [messages.MigrationCancelled("m")]
    assert source.outgoing_migrations.counts == {"kept:weights changed": 1}
    target.incoming_migrations.give_up("weights changed")
    assert target.incoming_migrations.counts == {"weights changed": 1}


@pytest.mark.parametrize("paused", [True, False])
def test_no_move_begins_while_generation_is_paused_or_between_other_weights(paused, sides):
    source, target = sides
    ask = messages.ReserveRequest("n", "other", 10, 0, target.kv.layout)
    if paused:
        source.scheduler._engine_paused = target.scheduler._engine_paused = True
        source.outgoing_migrations.ordered(MigrateCommand("n", "r", 1), 1.0)
        assert source.take(messages.ReserveRequest) == []
        assert source.outgoing_migrations.under_way.keys() == {"m"}
    else:
        target.kv._weights = lambda: "second"
    target.incoming_migrations.asked(0, ask, 1.0)
    (refused,) = target.take(messages.ReserveRefused)
    expected = "generation paused" if paused else "another KV layout or other weights"
    assert refused.why == expected
