"""What the controller knows: prefixes, status messages, its own decisions in between."""

import subprocess
import sys
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang.cluster.load_tracker import OPEN_DISPATCHES, SILENT_S, LoadTracker
from pascal_sglang.cluster.messages import (
    LoadReport,
    MigrateCommand,
    MigrationEnded,
    ReasoningEnded,
)
from pascal_sglang.cluster.migration_coordinator import FORGET_S, MigrationCoordinator
from pascal_sglang.cluster.prefix_index import COMMON, PrefixIndex, block_names
from pascal_sglang.policy.placement import Placement
from pascal_sglang.policy.prefix_namespace import Namespace, namespace_of, namespace_sent


def status(**more):
    figures = {
        "dp_rank": 0,
        "received": 0,
        "on_pace": True,
        "footprint": 10,
        "reasoning": 1,
        "fresh": 2,
        "free": 90,
        "fits": 12,
        "waiting": 5,
        "capacity": 100,
        "load": 1,
        "batch": 1,
        "pass_us": 5000,
        "prefill_ns": 800,
    }
    return LoadReport(**{**figures, **more})


def names(ids, block_tokens, salt=None):
    return list(block_names(ids, Namespace(cache_salt=salt), block_tokens))


def test_a_prefix_is_found_by_whole_blocks_where_it_was_sent():
    prefixes = PrefixIndex(block_tokens=4)
    prefixes.sent(0, names([1, 2, 3, 4, 5, 6, 7, 8, 9], 4))
    prefixes.sent(1, names([1, 2, 3, 4, 9, 9, 9, 9], 4))
    assert prefixes.hits(names([1, 2, 3, 4, 5, 6, 7, 8, 1], 4)) == {0: 8, 1: 4}
    assert prefixes.hits(names([1, 2, 3], 4)) == {}
    assert prefixes.hits(names([2, 2, 3, 4, 5, 6, 7, 8], 4)) == {}, (
        "a later block alone is no prefix"
    )
    assert prefixes.hits(names([1, 2, 3, 4], 4, "other")) == {}


def test_the_memory_of_prefixes_is_bounded():
    prefixes = PrefixIndex(block_tokens=2, capacity=3)
    for start in range(10):
        prefixes.sent(0, names([start, start], 2))
    assert len(prefixes) == 3
    assert prefixes.hits(names([9, 9], 2)) == {0: 2}
    assert prefixes.hits(names([0, 0], 2)) == {}


def test_a_conversations_next_turn_is_found_where_its_last_one_ended():
    prefixes = PrefixIndex(block_tokens=2)
    prefixes.sent(0, names([1, 1, 2, 2], 2))
    prefixes.ended(1, names([1, 1, 2, 2, 3, 3], 2))
    assert prefixes.hits(names([1, 1, 2, 2, 3, 3, 4, 4], 2)) == {1: 6}
    prefixes.forget(1)
    assert prefixes.hits(names([1, 1, 2, 2], 2)) == {}


def test_what_many_conversations_share_stays_known_everywhere():
    prefixes = PrefixIndex(block_tokens=2)
    for turn in range(COMMON):
        prefixes.sent(0, names([1, 1, turn, turn], 2))
    prefixes.ended(1, names([1, 1, 0, 0], 2))
    assert prefixes.hits(names([1, 1, 0, 0], 2)) == {0: 2, 1: 4}


def test_blocks_have_the_same_name_in_every_process():
    code = (
        "from pascal_sglang.cluster.prefix_index import *; "
        "print(list(block_names([7] * 64, Namespace('a'))))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert seen.stdout.strip() == str(list(block_names([7] * 64, Namespace("a"))))


@pytest.mark.parametrize("lora_id", [None, "adapter"])
@pytest.mark.parametrize("cache_salt", [None, "", "salt"])
@pytest.mark.parametrize("extra_key", [None, "", "key"])
def test_a_request_has_the_namespace_that_sglang_gives_it(extra_key, cache_salt, lora_id):
    """So that a reply is found where it ended."""
    fields = {"extra_key": extra_key, "cache_salt": cache_salt, "lora_id": lora_id}
    req = Req("r", "", array("q", [1]), SamplingParams(), **fields)
    assert namespace_of(req) == namespace_sent(SimpleNamespace(**fields))


def test_text_is_no_prefix_in_another_namespace():
    kinds = [Namespace(), Namespace("a"), Namespace(None, "a"), Namespace("a", "a")]
    kinds += [Namespace("", "a"), Namespace("\ud800"), Namespace("a', 'a")]
    assert len({name for kind in kinds for name in block_names([7] * 64, kind)}) == len(kinds)
    assert namespace_sent(SimpleNamespace()) == Namespace(), "an embedding has none"


def test_a_dispatch_counts_until_its_instance_has_taken_it_in():
    monitor = LoadTracker(2)
    monitor.sent(0, 20)
    monitor.sent(0, 30)
    monitor.hear(status(received=0), 1.0)
    assert (monitor.instances[0].reasoning, monitor.instances[0].waiting) == (3, 55)
    assert monitor.instances[0].fits == 10
    monitor.hear(status(received=1), 1.1)
    assert (monitor.instances[0].reasoning, monitor.instances[0].waiting) == (2, 35)
    monitor.hear(status(received=2), 1.2)
    assert (monitor.instances[0].reasoning, monitor.instances[0].waiting) == (1, 5)
    assert monitor.instances[1].footprint == 0


def test_an_instance_that_never_reports_does_not_fill_the_memory():
    monitor = LoadTracker(1)
    for _ in range(OPEN_DISPATCHES + 10):
        monitor.sent(0, 1)
    monitor.hear(status(reasoning=0, waiting=0), 1.0)
    assert monitor.instances[0].waiting == OPEN_DISPATCHES


def test_an_instance_that_stops_reporting_is_noticed():
    monitor = LoadTracker(2)
    monitor.hear(status(), 1.0)
    assert not monitor.is_silent(0, 1.0 + SILENT_S)
    assert monitor.is_silent(0, 1.1 + SILENT_S)
    assert not monitor.is_silent(1, 99.0), "it has not started to report"


def coordinator(reachable=True, **more):
    monitor, orders = LoadTracker(2), []

    def order(to, what):
        orders.append((to, what))
        return reachable

    monitor.hear(status(dp_rank=0, free=0), 1.0)
    monitor.hear(status(dp_rank=1, free=900), 1.0)
    placement = Placement(quantum=100, lazy=True)
    return MigrationCoordinator(monitor, placement, order, **more), monitor, orders


BOUNDARY = ReasoningEnded(0, "r", 50, 200, 200, 4)


def test_a_decision_looks_at_few_instances_and_at_the_one_it_is_about():
    monitor, placement = LoadTracker(40), Placement(quantum=100, lazy=True, sight=4)
    for index in range(40):
        monitor.hear(status(dp_rank=index, free=0 if index == 30 else 900 + index), 1.0)
    moving = MigrationCoordinator(monitor, placement, lambda to, what: True)
    at = ReasoningEnded(30, "r", 50, 200, 200, 4)
    assert moving.boundary(at, monitor.instances, 1.0).target == 3


def test_a_move_is_ordered_and_counted_until_it_is_over():
    moving, monitor, orders = coordinator()
    decision = moving.boundary(BOUNDARY, monitor.instances, 1.0)
    assert (decision.target, decision.why) == (1, "room_there")
    ((to, order),) = orders
    assert (to, order) == (0, MigrateCommand(order.migration, "r", 1))
    assert (monitor.instances[0].migrations, monitor.instances[1].arriving) == (1, 50)
    assert moving.over(MigrationEnded(1, order.migration, True, "")).target == 1
    assert (monitor.instances[0].migrations, monitor.instances[1].arriving) == (0, 0)
    assert moving.over(MigrationEnded(0, order.migration, True, "")) is None, "both sides report it"
    assert moving.ended == {"moved": 1}


def test_a_move_that_cannot_be_ordered_or_is_never_reported_stops_counting():
    moving, monitor, _ = coordinator(reachable=False)
    moving.boundary(BOUNDARY, monitor.instances, 1.0)
    assert monitor.instances[1].arriving == 0
    assert moving.ended == {"kept:unreachable": 1}
    moving, monitor, _ = coordinator()
    moving.boundary(BOUNDARY, monitor.instances, 1.0)
    moving.forget_old(FORGET_S)
    assert len(moving.under_way) == 1
    moving.forget_old(FORGET_S + 1.0)
    assert moving.ended == {"kept:forgotten": 1}
    assert monitor.instances[0].migrations == 0


def test_a_boundary_of_an_instance_that_is_no_more_leads_nowhere():
    moving, monitor, orders = coordinator()
    assert moving.boundary(BOUNDARY, monitor.instances[1:], 1.0) is None
    assert orders == []


def test_the_flood_moves_everybody():
    moving, monitor, orders = coordinator(force_migration=True)
    monitor.hear(status(dp_rank=0, free=900), 1.0)
    assert moving.boundary(BOUNDARY, monitor.instances, 1.0).why == "force_migration"
    assert moving.boundary(BOUNDARY, monitor.instances[:1], 1.0).why == "alone"
    assert len(orders) == 1
