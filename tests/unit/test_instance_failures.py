"""An instance dies: its own requests end, once each, and nobody else's."""

import multiprocessing.connection
import os
import signal
import time

import pytest

from pascal_sglang.cluster.instance_failures import CLAIM_S, InstanceFailures
from pascal_sglang.cluster.load_tracker import LoadTracker
from pascal_sglang.cluster.migration_coordinator import MigrationCoordinator, UnderWay
from pascal_sglang.cluster.request_locations import RequestLocations
from pascal_sglang.cluster.scheduler_processes import QUIT_S, SchedulerProcesses
from pascal_sglang.policy.placement import Placement


def scene():
    request_locations, failed = RequestLocations(), []
    coordinator = MigrationCoordinator(
        LoadTracker(2), Placement(quantum=1, lazy=True), lambda to, order: True
    )
    return (
        request_locations,
        coordinator,
        failed,
        InstanceFailures(request_locations, coordinator, failed.append),
    )


def test_its_own_requests_end_and_no_others():
    request_locations, _, failed, instance_failures = scene()
    for rid, home in (("a", 0), ("b", 1), ("c", 1), ("d", 1)):
        request_locations.lives(rid, home)
    request_locations.gone("d")
    instance_failures.died(1, 0.0)
    assert failed == ["b", "c"]
    assert request_locations.instance_of("a") == 0
    assert request_locations.of(1) == []


def test_who_was_moving_away_is_asked_after_where_it_went():
    request_locations, coordinator, failed, instance_failures = scene()
    for rid in ("arrived", "dropped", "nobody knows"):
        request_locations.lives(rid, 1)
        coordinator.under_way[rid] = UnderWay(rid, 1, 0, 10, 0.0)
    instance_failures.died(1, 0.0)
    assert failed == []
    request_locations.lives("arrived", 0)
    instance_failures.settled("arrived")
    instance_failures.settled("dropped")
    assert failed == ["dropped"]
    instance_failures.tick(CLAIM_S)
    instance_failures.tick(CLAIM_S + 1)
    assert failed == ["dropped", "nobody knows"]
    assert request_locations.instance_of("arrived") == 0


def test_who_arrives_at_the_dead_ends_too():
    request_locations, coordinator, failed, instance_failures = scene()
    request_locations.lives("r", 0)
    coordinator.under_way["r"] = UnderWay("r", 0, 1, 10, 0.0)
    instance_failures.died(1, 0.0)
    assert failed == []
    request_locations.lives("r", 1)
    instance_failures.settled("r")
    assert failed == ["r"]


def test_the_memory_of_homes_is_bounded():
    request_locations = RequestLocations(capacity=2)
    for number in range(5):
        request_locations.lives(str(number), 0)
    assert len(request_locations) == 2
    assert request_locations.of(0) == ["3", "4"]


def sleeper():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    return process


def test_the_end_of_a_process_is_seen_and_its_other_ranks_follow():
    ranks = [sleeper() for _ in range(3)]
    try:
        watched = SchedulerProcesses(
            ranks, {p.pid: home for p, home in zip(ranks, (0, 1, 1), strict=True)}
        )
        ranks[1].kill()
        (ended,) = multiprocessing.connection.wait(watched.sentinels, 30)
        assert watched.ended(ended) == (1, False)
        ranks[2].join(30)
        assert ranks[2].exitcode == -signal.SIGKILL
        assert ranks[0].is_alive()
        assert len(watched.sentinels) == 2, "the other rank's end is still to be seen"
    finally:
        for process in ranks:
            process.kill()
            process.join()


def asked_to_quit(dies):
    """A controller whose scheduler asks for the end, and then ends or hangs."""
    watched = SchedulerProcesses([], {})
    watched.outlive_schedulers()
    os.kill(os.getpid(), signal.SIGQUIT)
    watched.tick(0.0)
    if dies:
        watched._quit_at = None  # As `ended` leaves it.
    watched.tick(QUIT_S + 1)
    os._exit(7)


@pytest.mark.parametrize(("dies", "exitcode"), [(True, 7), (False, -signal.SIGQUIT)])
def test_a_scheduler_that_fails_does_not_take_the_controller_along_but_one_that_hangs_does(
    dies, exitcode
):
    process = multiprocessing.get_context("spawn").Process(target=asked_to_quit, args=(dies,))
    process.start()
    process.join(60)
    assert process.exitcode == exitcode
