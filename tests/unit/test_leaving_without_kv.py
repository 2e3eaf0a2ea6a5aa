"""A request leaves an instance that is drained without KV: it waits, or its KV is dropped."""

import pytest

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.messages import DrainCommand, MigrateCommand
from pascal_sglang.engine.kv.paused import PauseStatus
from pascal_sglang.policy.request import RequestStatus
from tests.unit import test_migration_copies

pair, request_of = test_migration_copies.pair, test_migration_copies.request_of


def waiting_on(source):
    """Its request, which waits to be prefilled."""
    request = request_of(source)
    source.scheduler.running_batch.reqs.clear()
    source.scheduler.waiting_queue.append(request)
    return request


def granted(source, target, command):
    """The move has begun, and the target has room for it."""
    target.states.queue_again = lambda req: target.said.append(("queued", req))
    source.states.wait_again = lambda req: source.said.append(("queued", req))
    source.outgoing_migrations.ordered(command, 1.0)
    (ask,) = source.take(messages.ReserveRequest)
    assert ask.tokens == 0, "it needs no memory"
    target.pool.free_tokens = 0
    target.incoming_migrations.asked(0, ask, 1.0)
    (word,) = target.take(messages.ReserveGranted)
    source.outgoing_migrations.hear(1, word, 1.0)


def moves(source, target):
    (handover,) = source.take(messages.Handover)
    assert (handover.begin, handover.kv_tokens) == (0, 0)
    target.incoming_migrations.hear(0, handover, 1.0)
    (request,) = (said[1] for said in target.said if isinstance(said, tuple))
    assert target.paused_requests.held() == set()
    source.outgoing_migrations.hear(1, *target.take(messages.CommitAck), 1.0)
    assert source.outgoing_migrations.counts == {"moved": 1}
    assert source.paused_requests.held() == set()
    return request


def test_one_that_waits_waits_on_the_target_next(pair):
    source, target = pair
    waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    source.step()
    assert source.scheduler.waiting_queue == []
    moves(source, target)


def test_one_without_kv_has_no_rows_of_a_draft_model_either(pair, monkeypatch):
    """`unpack` refuses rows that are not the draft model's, which none are."""

    def unpack(rows, scheduler):
        raise ValueError("other rows than the draft model has")

    monkeypatch.setattr("pascal_sglang.engine.migration.incoming.unpack", unpack)
    source, target = pair
    waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    source.step()
    moves(source, target)


def test_one_whose_kv_was_promised_does_not_come_without(pair):
    source, target = pair
    waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    source.step()
    (handover,) = source.take(messages.Handover)
    target.incoming_migrations.under_way["m"].tokens = 50
    target.incoming_migrations.hear(0, handover, 1.0)
    assert target.take(messages.ReserveRefused)[0].why == "KV that does not come"
    assert target.paused_requests.held() == set()


def test_one_that_waits_does_not_move_at_a_boundary(pair):
    source, _ = pair
    waiting_on(source)
    source.outgoing_migrations.ordered(MigrateCommand("m", "r", 1), 1.0)
    assert source.take(messages.MigrationEnded)[0].why == "not here"


def test_one_whose_prefill_begins_meanwhile_stays(pair):
    source, target = pair
    waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    source.scheduler.waiting_queue.clear()
    source.step()
    assert source.outgoing_migrations.counts == {"kept:recompute": 1}
    assert source.take(messages.Handover) == []


def test_one_that_the_target_refuses_at_last_waits_here_again(pair):
    source, target = pair
    request = waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    source.step()
    source.outgoing_migrations.hear(1, messages.ReserveRefused("m", "timeout"), 1.0)
    assert ("queued", request) in source.said
    assert source.paused_requests.held() == set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_that_is_aborted_is_put_back_for_the_abort_to_find(pair, when):
    source, target = pair
    request = waiting_on(source)
    granted(source, target, DrainCommand("m", "r", 1, False))
    if when == "before":
        source.outgoing_migrations.aborted(lambda rid: rid == "r")
        assert source.scheduler.waiting_queue == [request]
        assert source.outgoing_migrations.counts == {"kept:aborted": 1}
        return
    ended = []
    source.scheduler.end_early = lambda req, problem: ended.append((req, problem))
    source.step()
    source.outgoing_migrations.aborted(lambda rid: rid == "r")
    assert source.outgoing_migrations.under_way, "it may be the target's"
    source.outgoing_migrations.hear(1, messages.ReserveRefused("m", "aborted"), 1.0)
    assert ended == [(request, None)]


def test_a_paused_one_drops_its_kv_and_waits_on_the_target(pair):
    source, target = pair
    request = request_of(source)
    source.paused_requests.leave([request], source.scheduler.running_batch, None)
    granted(source, target, DrainCommand("m", "r", 1, True))
    assert source.paused_requests.status_of(request) is PauseStatus.RESIDENT
    source.step()
    assert source.paused_requests.status_of(request) is PauseStatus.DROPPED
    assert request.kv.kv_committed_len == 0, "as after a retraction"
    moves(source, target)


def test_a_running_one_leaves_the_batch_first(pair, monkeypatch):
    source, target = pair
    request = request_of(source)
    leaving = []
    monkeypatch.setattr(
        source.paused_requests,
        "leave",
        lambda reqs, running, tier: (
            leaving.append(tier(request)),
            running.reqs.remove(request),
            source.paused_requests._enter(request, PauseStatus.LEAVING),
        ),
    )
    granted(source, target, DrainCommand("m", "r", 1, True))
    source.step()
    assert [tier.value for tier in leaving] == ["recompute"]
    assert source.take(messages.Handover) == [], "its last token is on its way"
    source.paused_requests._remove_kv(request)  # As `finish_pauses` does.
    source.step()
    moves(source, target)


def test_a_running_one_that_is_refused_goes_on_waiting_here(pair):
    source, target = pair
    request = request_of(source)
    source.paused_requests.leave([request], source.scheduler.running_batch, None)
    granted(source, target, DrainCommand("m", "r", 1, True))
    source.step()
    source.outgoing_migrations.hear(1, messages.ReserveRefused("m", "timeout"), 1.0)
    assert ("queued", request) in source.said
    assert ("stopped", RequestStatus.RESIDENT) not in source.said
