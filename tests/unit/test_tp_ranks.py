"""A tensor-parallel rank that fails alone ends the instance; one that fails like all others does
not."""

from types import SimpleNamespace

import pytest
import torch

from pascal_sglang.engine.migration.manager import Migrations
from pascal_sglang.engine.tp_ranks import RanksDiverged, agree, all_agree, catch_on_all_ranks


def test_ranks_hear_the_first_one_and_agree_if_all_do(both):
    def work(rank, scheduler):
        return (
            agree(scheduler, 5.0 + rank),
            agree(scheduler, 1.5 - rank, 2.0),
            all_agree(scheduler, rank == 0),
        )

    assert both(work) == [(5.0, [1.5, 2.0], False)] * 2


def broken(number):
    raise torch.OutOfMemoryError(f"not on device {number}")


def test_an_error_that_all_ranks_have_is_theirs_to_go_on_with(both):
    def work(rank, scheduler):
        error = catch_on_all_ranks(scheduler, lambda: broken(rank))
        return type(error), agree(scheduler, 3.0)

    assert both(work) == [(torch.OutOfMemoryError, 3.0)] * 2


def test_a_rank_that_fails_alone_ends_the_instance_and_says_why(both):
    def work(rank, scheduler):
        return catch_on_all_ranks(scheduler, lambda: broken(rank) if rank else None)

    first, second = both(work)
    assert "failed alone (not here)" in str(first)
    assert "failed alone (here: OutOfMemoryError: not on device 1)" in str(second)


@pytest.mark.parametrize("meets", [agree, all_agree])
def test_wherever_the_others_are_by_then(both, meets):
    """The one rank has gone on to the end of its pass, the other one asks something on the way."""

    def work(rank, scheduler):
        return catch_on_all_ranks(
            scheduler, lambda: broken(rank) if rank else meets(scheduler, True)
        )

    assert [type(found) for found in both(work)] == [RanksDiverged] * 2


def test_an_error_in_the_same_place_for_another_request_is_another_one(both):
    def work(rank, scheduler):
        scheduler.token_to_kv_pool_allocator.available_size = lambda: rank
        return catch_on_all_ranks(scheduler, lambda: broken(0))

    assert [type(found) for found in both(work)] == [RanksDiverged] * 2


def test_alone_an_error_is_returned_and_nobody_is_met():
    scheduler = SimpleNamespace(attn_tp_cpu_group=SimpleNamespace(size=lambda: 1))
    assert isinstance(catch_on_all_ranks(scheduler, lambda: broken(0)), torch.OutOfMemoryError)
    assert catch_on_all_ranks(scheduler, lambda: None) is None
    assert agree(scheduler, 4.0) == 4.0


def test_a_message_that_fails_on_one_rank_only_ends_the_instance(both, monkeypatch):
    module = "pascal_sglang.engine.migration.manager"
    parallel = SimpleNamespace(dp_rank=0, num_dp_ranks=2)
    monkeypatch.setattr("pascal_sglang.instances.get_parallel", lambda: parallel)
    monkeypatch.setattr(f"{module}.unpack", lambda data, instances: (1, data))

    def work(rank, scheduler):
        class Failing(Migrations):
            def _take_in(self, sender, message, now):
                if rank in message:
                    broken(0)

        migrations = Failing(
            states=SimpleNamespace(scheduler=scheduler),
            outgoing_migrations=SimpleNamespace(),
            incoming_migrations=None,
            control_sender=None,
            force_migration=0.0,
        )
        migrations.hear(SimpleNamespace(messages=[(), (0, 1)], now=1.0))
        rejected = dict(migrations.rejected)
        try:
            migrations.hear(SimpleNamespace(messages=[(1,), ()], now=1.0))
        except RanksDiverged:
            return rejected
        return None

    assert both(work) == [{"failed": 1}] * 2
